"""The door of metrics: every number in the table means what its row says, whatever the order and the way it came."""

import math

import pytest
import torch
from pages import names_of

from smalti.errors import DataError
from smalti.evaluation.features import KINDS, FeatureSet, NetworkIdentity, extract
from smalti.evaluation.metric import GROUPS, group_of_each, measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.moments import Moments

WIDTHS = {"pool": 72, "spatial": 70, "logits": 12}
COUNT, REAL_COUNT = 124, 150


def _table():
    """The table, and the metric of docs/adding/metric.md, which puts itself there for a moment."""
    before = dict(METRICS)
    names_of("adding/metric.md")
    try:
        return dict(METRICS)
    finally:
        METRICS.clear()
        METRICS.update(before)


TABLE = _table()
NAMES = list(TABLE)
COMPARING = [name for name in NAMES if TABLE[name].reference != "nothing"]


def _set(count, seed, shift=0.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return FeatureSet({kind: torch.randn(count, width, generator=g) * scale + shift for kind, width in WIDTHS.items()})


def _ours():
    return _set(COUNT, 0, shift=0.1)


def _real(name):
    return None if TABLE[name].reference == "nothing" else _set(REAL_COUNT, 1)


def _measured(name, ours, reference, **kwargs):
    return measure(ours, reference, [name], TABLE, network=TABLE[name].network or "any", **kwargs)[name]


def _value(name, ours, reference):
    return _measured(name, ours, reference, intervals=False).value


def _shuffled(features, seed):
    order = torch.randperm(features.count, generator=torch.Generator().manual_seed(seed))
    return features.subset(order)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_says_what_it_is(name):
    metric = TABLE[name]
    assert metric.label
    assert "\n" not in metric.definition
    assert metric.definition
    assert metric.needs
    assert set(metric.needs) <= set(KINDS)
    assert metric.bounds[0] < metric.bounds[1]
    caution = metric.caution(_ours(), _real(name))
    assert "\n" not in caution


@pytest.mark.parametrize("name", NAMES)
def test_a_number_and_its_interval_stay_within_the_bounds(name):
    found = _measured(name, _ours(), _real(name))
    low, high = TABLE[name].bounds
    assert low <= found.low <= found.value <= found.high <= high
    assert found.standard_error >= 0


@pytest.mark.parametrize("name", COMPARING)
def test_the_reference_against_itself_is_as_good_as_can_be(name):
    metric, real = TABLE[name], _real(name)
    itself = _value(name, real, real)
    far = _value(name, _set(COUNT, 0, shift=3.0), real)
    best = metric.bounds[0 if metric.better == "lower" else 1]
    if math.isfinite(best):
        assert itself == pytest.approx(best, abs=1e-9 * max(1.0, abs(far)))
    assert itself < far if metric.better == "lower" else itself > far


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_images_does_not_matter(name):
    ours, real = _ours(), _real(name)
    found = _measured(name, ours, real)
    other = _value(name, _shuffled(ours, 2), real and _shuffled(real, 3))
    if TABLE[name].ordered:  # other pieces of the same images: by less than what is said to be uncertain
        assert abs(other - found.value) <= found.standard_error
    else:
        assert other == pytest.approx(found.value, rel=1e-9, abs=1e-12)


class _Linear:
    """A feature network that is a fixed matrix."""

    identity = NetworkIdentity("any", "none", "none")
    widths = WIDTHS

    def __init__(self):
        g = torch.Generator().manual_seed(5)
        self.weight = {kind: torch.randn(27, width, generator=g) for kind, width in WIDTHS.items()}

    def __call__(self, images):
        pixels = (images.float() / 255).flatten(1)
        return {kind: pixels @ weight for kind, weight in self.weight.items()}


@pytest.mark.parametrize("name", NAMES)
def test_it_does_not_matter_how_features_were_gathered(name):
    g = torch.Generator().manual_seed(6)
    images = torch.randint(0, 256, (COUNT, 3, 3, 3), dtype=torch.uint8, generator=g)
    real = extract(torch.randint(0, 256, (REAL_COUNT, 3, 3, 3), dtype=torch.uint8, generator=g).split(50), _Linear())
    real = None if TABLE[name].reference == "nothing" else real
    numbers = {_value(name, extract(images.split(cut), _Linear()), real) for cut in (COUNT, 1, 7)}
    assert len(numbers) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if TABLE[name].reference == "moments"])
def test_statistics_of_the_reference_merged_from_parts_do_as_well_as_its_images(name):
    ours, real = _ours(), _real(name)
    parts = [real.subset(range(start, start + 50)) for start in (0, 50, 100)]
    stated = {kind: Moments.merged(part.moments(kind) for part in parts) for kind in WIDTHS}
    assert _value(name, ours, FeatureSet({}, stated)) == pytest.approx(_value(name, ours, real), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_without_a_group_is_that_of_the_other_images(name):
    metric, ours, real = TABLE[name], _ours(), _real(name)
    groups = group_of_each(COUNT)
    found = metric.family(ours, real, groups)[name]
    assert found.value == pytest.approx(metric.family(ours, real, None)[name].value, rel=1e-9, abs=1e-12)
    assert len(found.without) == GROUPS
    error = _measured(name, ours, real).standard_error
    for out in (0, 3, GROUPS - 1):
        plain = metric.family(ours.subset((groups != out).nonzero()[:, 0]), real, None)[name].value
        if metric.ordered:
            assert abs(found.without[out] - plain) <= error
        else:
            assert found.without[out] == pytest.approx(plain, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_missing_are_named_in_one_line(name):
    for kind in TABLE[name].needs:
        ours = FeatureSet({other: rows for other, rows in _ours().features.items() if other != kind})
        with pytest.raises(DataError, match=f"needs the {kind} features") as caught:
            _value(name, ours, _real(name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", COMPARING)
def test_a_comparison_without_the_reference_that_it_needs_is_refused_in_one_line(name):
    with pytest.raises(DataError, match="give a reference"):
        _value(name, _ours(), None)
    with pytest.raises(DataError, match="give a reference"):
        TABLE[name].family(_ours(), None, None)
    if TABLE[name].reference == "features":
        real = _real(name)
        stated = FeatureSet({}, {kind: real.moments(kind) for kind in TABLE[name].needs})
        with pytest.raises(DataError, match="statistics alone do not do"):
            _value(name, _ours(), stated)


def test_the_metric_of_the_documentation_is_tested_and_does_not_stay():
    assert set(TABLE) - set(METRICS) == {"fd_means"}


def test_the_metric_of_the_documentation_is_the_part_of_the_frechet_distance_that_its_page_says():
    ours, real = _ours(), _real("fd_means")
    spread = FeatureSet({"pool": ours.rows("pool") - ours.rows("pool").mean(dim=0) + real.rows("pool").mean(dim=0)})
    means, whole, rest = (
        _measured(name, images, real, intervals=False).value
        for name, images in (("fd_means", ours), ("fd", ours), ("fd", spread))
    )
    # Shifting float32 features onto the other mean rounds each of them by 2^-24 of itself.
    assert means == pytest.approx(whole - rest, rel=1e-4)
    assert means > 0
