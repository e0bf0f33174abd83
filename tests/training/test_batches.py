"""The data of a step is a function of counters: every test here would fail for anything that remembers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import array_images

from smalti.data import SampleOrder
from smalti.data.examples import PixelExamples
from smalti.diffusion.levels import build_schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.training.batches import BatchSource

CLASSES = 4


def source(seed=0, *, count=37, schedule="linear", flip=False, balanced=False, null_class=CLASSES, **objective):
    pixels = np.random.default_rng(5).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    images = array_images(pixels, np.arange(count) % CLASSES)
    return BatchSource(
        examples=PixelExamples(images),
        order=SampleOrder(range(count), seed, class_balanced=balanced, class_labels=images.class_labels),
        schedule=build_schedule(schedule, 1000),
        objective=ObjectiveConfig(schedule=schedule, prediction="v", **objective),
        null_class=null_class,
        flip=flip,
        seed=seed,
    )


def columns(batch):
    return (batch.x0, batch.class_labels, batch.eps, batch.levels.timesteps, batch.levels.alpha, batch.levels.sigma)


@pytest.mark.parametrize("schedule", ["linear", "flow"])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_position_is_the_same_sample_whatever_the_batch_it_comes_in(schedule, balanced):
    whole = columns(source(schedule=schedule, flip=True, balanced=balanced).at(0, 120))  # more than three epochs
    for cuts in ([120], [1] * 120, [7] * 17 + [1], [64, 32, 16, 8]):
        fresh, parts, start = source(schedule=schedule, flip=True, balanced=balanced), [], 0
        for count in cuts:
            parts.append(columns(fresh.at(start, count)))
            start += count
        for expected, got in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
            assert torch.equal(expected, got)


def test_a_position_does_not_depend_on_what_was_asked_before():
    used = source(flip=True)
    for start in (500, 3, 77):
        used.at(start, 5)
    for expected, got in zip(columns(source(flip=True).at(20, 6)), columns(used.at(20, 6)), strict=True):
        assert torch.equal(expected, got)


def test_an_epoch_holds_every_image_once_and_the_next_has_another_order():
    batches = source(label_dropout=0.0)
    first, second = batches.at(0, 37).x0.flatten(1), batches.at(37, 37).x0.flatten(1)
    assert len(torch.unique(first, dim=0)) == 37
    assert torch.equal(torch.unique(first, dim=0), torch.unique(second, dim=0))
    assert not torch.equal(first, second)


def test_the_share_of_hidden_labels_is_the_one_asked_for():
    """Binomial: five standard deviations at 8,000 draws."""
    n = 8000
    for share in (0.1, 0.5):
        labels = source(label_dropout=share).at(0, n).class_labels
        assert abs((labels == CLASSES).double().mean().item() - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert (source(label_dropout=0.0).at(0, 500).class_labels < CLASSES).all()
    assert (source(label_dropout=1.0).at(0, 500).class_labels == CLASSES).all()


def test_labels_that_are_not_hidden_stay_with_their_image():
    hidden, shown = source(label_dropout=0.5).at(0, 200), source(label_dropout=0.0).at(0, 200)
    kept = hidden.class_labels < CLASSES
    assert kept.any()
    assert torch.equal(hidden.class_labels[kept], shown.class_labels[kept])
    assert torch.equal(hidden.x0, shown.x0)
    assert torch.equal(hidden.eps, shown.eps)


def test_a_network_without_null_class_sees_every_label():
    assert (source(null_class=None, label_dropout=0.5).at(0, 200).class_labels < CLASSES).all()


def test_noise_has_the_moments_of_the_normal_distribution_and_no_position_repeats_another():
    """Five standard deviations of each estimate for independent normal numbers."""
    eps = source().at(0, 4000).eps.double()
    n = eps.numel()
    assert abs(eps.mean().item()) < 5 * (1 / n) ** 0.5
    assert abs(eps.square().mean().item() - 1) < 5 * (2 / n) ** 0.5
    assert abs(eps.pow(3).mean().item()) < 5 * (15 / n) ** 0.5
    assert abs(eps.pow(4).mean().item() - 3) < 5 * (96 / n) ** 0.5
    neighbours = (eps[1:] * eps[:-1]).mean().item()
    assert abs(neighbours) < 5 * (1 / n) ** 0.5
    assert len(torch.unique(eps.flatten(1), dim=0)) == 4000


def test_levels_are_spread_evenly_and_know_nothing_of_the_label_fate():
    n = 8000
    batch = source(label_dropout=0.5).at(0, n)
    times = batch.levels.timesteps.double() / 1000
    counts = torch.histc(times, bins=8, min=0, max=1)
    assert (counts - n / 8).abs().max().item() < 5 * (n / 8 * 7 / 8) ** 0.5
    hidden = (batch.class_labels == CLASSES).double()
    correlation = torch.corrcoef(torch.stack([times, hidden]))[0, 1].item()
    assert abs(correlation) < 5 / n**0.5


def test_another_seed_changes_order_noise_levels_and_label_fate():
    one, two = source(0, label_dropout=0.5).at(0, 400), source(1, label_dropout=0.5).at(0, 400)
    assert not torch.equal(one.x0, two.x0)
    assert abs((one.eps * two.eps).double().mean().item()) < 5 / one.eps.numel() ** 0.5
    stacked = torch.stack([one.levels.timesteps, two.levels.timesteps]).double()
    assert abs(torch.corrcoef(stacked)[0, 1].item()) < 5 / 400**0.5
    fates = torch.stack([(b.class_labels == CLASSES).double() for b in (one, two)])
    assert abs(torch.corrcoef(fates)[0, 1].item()) < 5 / 400**0.5


def test_labels_are_hidden_from_all_tables_at_once_or_from_each_alone():
    positions, tables, rate = 4000, 3, 0.3
    shared = replace(source(label_dropout=rate), label_tables=tables).at(0, positions).class_labels
    assert shared.shape == (positions,)
    apart = replace(source(label_dropout=rate, label_drop="independent"), label_tables=tables)
    labels = apart.at(0, positions).class_labels
    assert labels.shape == (positions, tables)
    hidden = labels == CLASSES
    spread = 5 * (rate * (1 - rate) / positions) ** 0.5
    assert all(abs(hidden[:, k].double().mean().item() - rate) < spread for k in range(tables))
    assert hidden.all(dim=1).double().mean().item() == pytest.approx(rate**3, abs=spread)
    plain = source(label_dropout=0.0).at(0, positions).class_labels
    assert torch.equal(labels.where(~hidden, plain[:, None]), plain[:, None].expand(-1, tables))
    assert torch.equal(torch.cat([apart.at(0, 7).class_labels, apart.at(7, 9).class_labels]), labels[:16])


def test_a_network_with_one_table_has_nothing_to_hide_apart():
    assert torch.equal(
        source(label_drop="independent").at(0, 50).class_labels, source(label_drop="shared").at(0, 50).class_labels
    )
