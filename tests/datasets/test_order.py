"""Split and sample order: pure functions of a seed, exact in their counts."""

from collections import Counter

import numpy as np
import pytest

from smalti.data import ArrayImages, SampleOrder, split
from smalti.errors import ConfigError, DataError


def image_set(split_names, labels=None, class_names=()):
    n = len(split_names)
    return ArrayImages(
        name="made up",
        class_names=tuple(class_names),
        class_labels=np.asarray(labels if labels is not None else [], dtype=np.int64),
        item_names=tuple(f"{name} {i}" for i, name in enumerate(split_names)),
        split_names=tuple(split_names),
        fingerprint="",
        images=np.zeros((n, 2, 2, 3), np.uint8),
    )


NAMES = [f"name {i}" for i in range(101)]
GOLDEN_SPLIT = [14, 18, 37, 68, 99]
GOLDEN_ORDER = [88, 0, 22, 25, 53, 60, 18, 81]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.125, 0.5, 0.9])
def test_split_sets_aside_exactly_the_rounded_fraction_of_names(fraction):
    parts = split(image_set(NAMES), fraction, seed=3)
    assert len(parts.validation) == round(fraction * 101)
    assert sorted([*parts.train, *parts.validation]) == list(range(101))


def test_split_keeps_all_images_of_a_name_together():
    images = image_set([NAMES[i // 3] for i in range(300)])
    parts = split(images, 0.2, seed=0)
    held, trained = ({images.split_names[i] for i in part} for part in (parts.validation, parts.train))
    assert len(held) == 20
    assert not held & trained


def test_split_depends_on_names_and_seed_not_on_order():
    def held(images, seed):
        return {images.split_names[i] for i in split(images, 0.2, seed).validation}

    forward, backward = image_set(NAMES), image_set(NAMES[::-1])
    assert held(forward, 5) == held(backward, 5)
    assert held(forward, 5) != held(forward, 6)


def test_split_is_frozen():
    # Golden: a stored run resumes only if the same images stay unseen.
    assert split(image_set(NAMES), 0.05, seed=0).validation.tolist() == GOLDEN_SPLIT


def test_adding_a_name_moves_at_most_the_name_at_the_cut():
    before = {NAMES[i] for i in split(image_set(NAMES), 0.2, 1).validation}
    more = [*NAMES, "one more"]
    after = {more[i] for i in split(image_set(more), 0.2, 1).validation}
    assert len(before ^ after) <= 2


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_split_refuses_impossible_fractions(fraction):
    with pytest.raises(ConfigError, match="outside"):
        split(image_set(NAMES), fraction, seed=0)


def test_split_refuses_to_set_nothing_or_everything_aside():
    with pytest.raises(DataError, match="0 of 3 names"):
        split(image_set(NAMES[:3]), 0.1, seed=0)
    with pytest.raises(DataError, match="2 of 2 names"):
        split(image_set(NAMES[:2]), 0.9, seed=0)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_order_is_a_new_permutation_in_every_epoch(size):
    indices = [3 * i + 1 for i in range(size)]
    order = SampleOrder(indices, seed=4)
    epochs = [[order.at(e * size + p) for p in range(size)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(i for _, i in epoch) == indices
    if size >= 64:
        assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
        # A random permutation leaves one place unmoved on average (Poisson); six or more has probability 6e-4.
        assert sum(a == b for (_, a), b in zip(epochs[0], indices, strict=True)) < 6


def test_order_has_random_access_and_depends_on_the_seed():
    forward = [SampleOrder(range(50), seed=1).at(p) for p in range(200)]
    order = SampleOrder(range(50), seed=1)
    assert [order.at(p) for p in reversed(range(200))] == forward[::-1]
    assert [SampleOrder(range(50), seed=2).at(p) for p in range(200)] != forward


def test_order_is_frozen():
    assert [SampleOrder(range(100), seed=0).at(p)[1] for p in range(8)] == GOLDEN_ORDER


LABELS = np.array([0] * 50 + [1] * 7 + [2] * 3)


def test_balanced_order_draws_all_classes_equally_often():
    order = SampleOrder(range(60), seed=0, class_balanced=True, class_labels=LABELS)
    drawn = [order.at(p)[1] for p in range(300)]
    assert Counter(LABELS[drawn].tolist()) == {0: 100, 1: 100, 2: 100}
    for start in range(0, 300, 3):
        assert set(LABELS[drawn[start : start + 3]].tolist()) == {0, 1, 2}
    # Within a class all images come before any comes again.
    for label, members in ((0, 50), (1, 7), (2, 3)):
        of_class = [i for i in drawn if LABELS[i] == label]
        for start in range(0, 100 - members, members):
            assert len(set(of_class[start : start + members])) == members


def test_balanced_order_takes_from_the_training_images_only():
    train = [i for i in range(60) if i % 2]
    order = SampleOrder(train, seed=0, class_balanced=True, class_labels=LABELS)
    assert {order.at(p)[1] for p in range(400)} == set(train)
    assert order.at(len(train) + 1)[0] == 1


def test_balanced_order_has_random_access():
    order = SampleOrder(range(60), seed=9, class_balanced=True, class_labels=LABELS)
    forward = [order.at(p) for p in range(100)]
    assert [order.at(p) for p in reversed(range(100))] == forward[::-1]


def test_order_refuses_what_it_cannot_draw():
    with pytest.raises(DataError, match="no training image"):
        SampleOrder([], seed=0)
    with pytest.raises(ConfigError, match="no classes"):
        SampleOrder([0], seed=0, class_balanced=True, class_labels=np.zeros(0, np.int64))
