"""Split and sample order: pure functions of a seed, exact in their counts."""

import hashlib
import time
from collections import Counter

import numpy as np
import pytest

from smalti.data import ArrayImages, SampleOrder, split
from smalti.data.order import BlockOrder, named_examples, permutation, splitmix64_of, training_order
from smalti.errors import ConfigError, DataError
from smalti.streams import SPLIT, key, permute, splitmix64


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
GOLDEN_BLOCKS = [67, 83, 16, 13, 66, 62, 64, 15]


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


def held_out_one_by_one(names, count, seed):
    """The definition: names ranked by (key, name), one at a time."""

    def rank(name):
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        return key(seed, SPLIT, int.from_bytes(digest[:8], "little")), name

    return set(sorted(set(names), key=rank)[:count])


@pytest.mark.parametrize("seed", [0, 1, 12345, -7, 2**63 + 5])
def test_split_of_many_names_at_once_is_that_of_one_name_after_the_other(seed):
    names = [f"n{i % 7}/größe \udce9 {i // 2}" for i in range(2000)]
    images = image_set(names)
    for fraction in (0.001, 0.1, 0.77):
        validation = split(images, fraction, seed).validation
        expected = held_out_one_by_one(names, round(fraction * len(set(names))), seed)
        assert [i for i, name in enumerate(names) if name in expected] == validation.tolist()


def test_names_of_equal_rank_are_taken_by_name(monkeypatch):
    from smalti.data import order

    monkeypatch.setattr(order, "splitmix64_of", lambda numbers: np.zeros(len(numbers), np.uint64))
    parts = split(image_set(["c", "a", "d", "b"]), 0.5, seed=0)
    assert parts.validation.tolist() == [1, 3]


def test_splitmix_of_many_is_splitmix_of_each():
    numbers = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    assert splitmix64_of(numbers).tolist() == [splitmix64(int(n)) for n in numbers]


def test_a_million_names_are_split_in_seconds():
    # A tenth of them here; the whole takes 1.4 s.
    images = image_set([f"n{i:08d}" for i in range(130_000)])
    started = time.process_time()
    split(images, 0.01, 0)
    assert time.process_time() - started < 5


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


def test_every_round_of_classes_and_every_pass_through_a_class_has_an_order_of_its_own():
    order = SampleOrder(range(60), seed=0, class_balanced=True, class_labels=LABELS)
    drawn = [order.at(p)[1] for p in range(300)]
    assert len({tuple(LABELS[drawn[start : start + 3]].tolist()) for start in range(0, 300, 3)}) == 6
    of_class = [i for i in drawn if LABELS[i] == 1]
    passes = [tuple(of_class[start : start + 7]) for start in range(0, 98, 7)]
    assert len(set(passes)) == len(passes)


@pytest.mark.parametrize("kind", ["full", "blocks"])
def test_a_replacement_is_a_training_image_and_another_one_at_each_attempt(kind):
    train = [i for i in range(100) if i % 3]

    def drawn(seed):
        order = SampleOrder(train, seed) if kind == "full" else BlockOrder(train, blocks_of(100, 10), seed)
        return [[order.replacement(index, attempt) for attempt in range(20)] for index in (4, 5)]

    first, second = drawn(0)
    assert {*first, *second} <= set(train)
    # Of 20 draws from 67, 17.4 differ on average.
    assert min(len(set(first)), len(set(second))) > 12
    assert first != second
    assert drawn(0) == [first, second]
    assert drawn(1)[0] != first


def test_order_refuses_what_it_cannot_draw():
    with pytest.raises(DataError, match="no training image"):
        SampleOrder([], seed=0)
    with pytest.raises(ConfigError, match="no classes"):
        SampleOrder([0], seed=0, class_balanced=True, class_labels=np.zeros(0, np.int64))


# Blocks


def blocks_of(count, each):
    return np.arange(0, count, each)


@pytest.mark.parametrize(
    ("count", "each", "window"), [(1, 1, 1), (10, 3, 1), (100, 7, 4), (100, 7, 99), (64, 8, 3), (5, 1, 2), (97, 97, 5)]
)
def test_block_order_is_a_new_permutation_in_every_epoch(count, each, window):
    order = BlockOrder(range(count), blocks_of(count, each), seed=4, window=window)
    assert len(order) == count
    epochs = [[order.at(e * count + p) for p in range(count)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(i for _, i in epoch) == list(range(count))
    if count >= 64 and each < count:
        first, second, third = ([i for _, i in epoch] for epoch in epochs)
        assert first != second != third != first


def test_block_order_takes_only_training_images_of_uneven_and_empty_blocks():
    starts = np.array([0, 5, 6, 50, 90])
    train = [i for i in range(100) if i % 3 and not 5 <= i < 50]
    order = BlockOrder(train, starts, seed=1, window=2)
    assert sorted(order.at(p)[1] for p in range(len(train))) == train
    with pytest.raises(ValueError, match="must rise"):
        BlockOrder(train[::-1], starts, seed=1)


def test_each_window_of_each_epoch_is_mixed_in_its_own_way():
    one = BlockOrder(range(97), blocks_of(97, 97), seed=4)  # all in one block
    epochs = [[one.at(97 * epoch + p)[1] for p in range(97)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    order = BlockOrder(range(80), blocks_of(80, 10), seed=0, window=4)
    places = [order.at(p)[1] % 10 for p in range(80)]  # inside the blocks
    assert places[:40] != places[40:]


def test_a_stretch_of_a_block_order_touches_the_blocks_of_its_windows_only():
    count, each, window = 10_000, 100, 4
    order = BlockOrder(range(count), blocks_of(count, each), seed=2, window=window)
    touched = []
    for start in range(0, count, 400):  # a window is 400 long
        blocks = {order.at(p)[1] // each for p in range(start, start + 400)}
        assert len(blocks) == window
        touched.append(blocks)
    assert sorted(b for blocks in touched for b in blocks) == list(range(100))
    across = {order.at(p)[1] // each for p in range(300, 500)}
    assert len(across) <= 2 * window
    within = [order.at(p)[1] // each for p in range(64)]
    assert len(set(within)) == window, "a batch mixes all blocks of its window"


def test_block_order_has_random_access_and_depends_on_the_seed():
    def order(seed):
        return BlockOrder(range(53), blocks_of(53, 6), seed=seed, window=3)

    forward = [order(1).at(p) for p in range(200)]
    jumping = order(1)
    assert [jumping.at(p) for p in reversed(range(200))] == forward[::-1]
    assert [order(1).at(p) for p in (170, 3, 99)] == [forward[p] for p in (170, 3, 99)]
    assert [order(2).at(p) for p in range(200)] != forward


def test_block_order_is_frozen():
    # Golden: a stored run goes on with the same images only if these stay.
    assert [BlockOrder(range(100), blocks_of(100, 10), 0, 3).at(p)[1] for p in range(8)] == GOLDEN_BLOCKS


def test_every_image_comes_at_every_part_of_an_epoch_equally_often():
    count, epochs = 40, 1000
    order = BlockOrder(range(count), blocks_of(count, 5), seed=0, window=3)
    found = np.zeros((count, 8))
    for epoch in range(epochs):
        for p in range(count):
            found[order.at(epoch * count + p)[1], p // 5] += 1
    expected = epochs * 5 / count
    # Chi-square of 7 degrees of freedom: above 40 once in a million.
    assert (((found - expected) ** 2 / expected).sum(axis=1) < 40).all()


def test_an_order_of_14_million_images_is_ready_at_once():
    count = 14_000_000
    started = time.process_time()
    order = BlockOrder(np.arange(count), blocks_of(count, 1024), seed=0)
    found = [order.at(5 * count + p) for p in range(1000)]
    assert time.process_time() - started < 20
    assert len(set(found)) == 1000


class Blocks:
    def __init__(self, images, far):
        self.name, self.class_names, self.class_labels = images.name, images.class_names, images.class_labels
        self.block_starts, self.wants_blocks = np.array([0, 4]), far


def test_blocks_are_chosen_where_a_set_wants_them_or_when_asked_for():
    images = image_set(NAMES[:10], [i % 2 for i in range(10)], ("a", "b"))
    near, far = Blocks(images, False), Blocks(images, True)

    def kind(catalogue, **options):
        return type(training_order(catalogue, range(10), 0, **options)).__name__

    assert [kind(c) for c in (images, near, far)] == ["SampleOrder", "SampleOrder", "BlockOrder"]
    assert [kind(c, shuffle="full") for c in (images, near, far)] == ["SampleOrder"] * 3
    assert [kind(c, shuffle="blocks") for c in (near, far)] == ["BlockOrder"] * 2
    assert kind(far, class_balanced=True) == "SampleOrder"
    with pytest.raises(ConfigError, match="has no blocks"):
        kind(images, shuffle="blocks")
    with pytest.raises(ConfigError, match="class-balanced order"):
        kind(near, shuffle="blocks", class_balanced=True)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        kind(far, window=0)
    with pytest.raises(DataError, match="no training image"):
        training_order(far, [], 0)
    narrow, wide = (training_order(far, range(10), 0, window=window) for window in (1, 2))
    assert [narrow.at(p) for p in range(10)] == [BlockOrder(range(10), far.block_starts, 0, 1).at(p) for p in range(10)]
    assert [narrow.at(p) for p in range(10)] != [wide.at(p) for p in range(10)]
    plain = training_order(images, range(10), 0)
    assert [plain.at(p) for p in range(20)] == [SampleOrder(range(10), 0).at(p) for p in range(20)]


def test_examples_are_named_for_messages_in_one_short_line():
    images, order = image_set(NAMES), SampleOrder(range(101), 0)
    first = [images.item_names[order.at(p)[1]] for p in range(2)]
    assert named_examples(images, order, range(2)) == f"2 examples: {first[0]!r}, {first[1]!r}"
    assert named_examples(images, order, range(64), listed=2) == f"64 examples: {first[0]!r}, {first[1]!r}, ..."


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_all_places_of_a_permutation_at_once_are_those_one_by_one(size):
    for permutation_key in (0, 7, (1 << 64) - 1):
        assert permutation(size, permutation_key).tolist() == [permute(i, size, permutation_key) for i in range(size)]
