"""Uncertainty by leaving out, and what `measure` refuses."""

import math

import pytest
import torch

from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import GROUPS, Metric, Values, group_of_each, jackknife, measure


def _mean_family(ours, reference, groups):
    rows = ours.rows("pool")[:, 0].double()
    without = [] if groups is None else [rows[groups != g].mean().item() for g in range(GROUPS)]
    return {"mean": Values(rows.mean().item(), tuple(without))}


TABLE = {
    "mean": Metric("Mean", "lower", ("pool",), "nothing", _mean_family, "mean"),
    "far": Metric("Far", "lower", ("pool",), "moments", _mean_family, "mean"),
    "only": Metric("Only", "lower", ("pool",), "nothing", _mean_family, "mean", network="inception"),
}


def _set(count, seed=0):
    return FeatureSet({"pool": torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))})


def test_the_standard_error_of_a_mean_is_the_textbook_one():
    ours = _set(5000)
    found = measure(ours, None, ["mean"], TABLE, network="lite0")["mean"]
    exact = 1 / math.sqrt(5000)  # unit variance
    assert found.value == pytest.approx(ours.rows("pool")[:, 0].double().mean().item())
    assert exact / 2.5 < found.standard_error < exact * 2.5  # chi with 9 degrees of freedom, far in its tails


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(400):
        found = measure(_set(200, seed), None, ["mean"], TABLE, network="lite0")["mean"]
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 400 <= 0.98  # 0.95 and three standard errors of 400 trials


def test_groups_are_even_and_the_same_every_time():
    groups = group_of_each(103)
    assert torch.equal(groups, group_of_each(103))
    assert set(torch.bincount(groups).tolist()) == {10, 11}


def test_too_few_images_give_a_number_without_an_interval():
    assert measure(_set(19), None, ["mean"], TABLE, network="lite0")["mean"].standard_error is None


def test_intervals_stay_within_the_bounds_of_the_metric():
    found = jackknife(Values(0.99, tuple(0.9 + 0.02 * i for i in range(GROUPS))), (0, 1))
    assert found.high == 1.0


@pytest.mark.parametrize(
    ("name", "says"), [("meen", "did you mean 'mean'"), ("only", "defined by the inception features")]
)
def test_a_metric_that_cannot_be_asked_for_is_refused(name, says):
    with pytest.raises(ConfigError, match=says):
        measure(_set(30), None, [name], TABLE, network="lite0")


def test_a_comparison_without_a_reference_is_refused():
    with pytest.raises(DataError, match="give a reference"):
        measure(_set(30), None, ["far"], TABLE, network="lite0")


def test_values_without_each_group_stay_with_the_number():
    found = measure(_set(200), None, ["mean"], TABLE, network="lite0")["mean"]
    rows, groups = _set(200).rows("pool")[:, 0].double(), group_of_each(200)
    assert found.without == tuple(rows[groups != g].mean().item() for g in range(GROUPS))
    assert measure(_set(19), None, ["mean"], TABLE, network="lite0")["mean"].without == ()
    assert jackknife(Values(1.0, (math.nan,) * GROUPS)).without == ()
