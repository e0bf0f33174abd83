"""Extrapolation to endlessly many images, on Gaussians whose distance is known."""

import math

import pytest
import torch

from smalti.errors import DataError
from smalti.evaluation.extrapolation import FD_INFINITY, HALVINGS, at_infinity
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.frechet import frechet_distance
from smalti.evaluation.metric import GROUPS, group_of_each, measure
from smalti.evaluation.moments import Moments

WIDTH, COUNT, TRIALS = 32, 2000, 40


def _truth():
    """Ours and the reference as Gaussians: other means, other spreads."""
    spread = torch.arange(1, WIDTH + 1).double() ** -0.5
    ours = Moments(None, 0.1 * spread, torch.diag((1.1 * spread) ** 2))
    return ours, Moments(None, torch.zeros(WIDTH).double(), torch.diag(spread**2))


def _draw(moments, seed):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(COUNT, WIDTH, generator=g) * moments.covariance.diag().sqrt() + moments.mean).float()


def test_most_of_the_bias_is_gone_and_the_error_is_as_large_as_it_says():
    ours, real = _truth()
    exact = frechet_distance(ours, real)
    reference = FeatureSet({}, {"pool": real})
    plain, found, said = [], [], []
    for seed in range(TRIALS):
        drawn = FeatureSet({"pool": _draw(ours, seed)})
        plain.append(frechet_distance(drawn.moments("pool"), real) - exact)
        estimate = measure(drawn, reference, ["fd"], {"fd": _AS_FD}, network="any")["fd"]
        found.append(estimate.value - exact)
        said.append(estimate.standard_error)
    plain, found = torch.tensor(plain), torch.tensor(found)
    before, after, noise = plain.mean(), found.mean(), found.std() / math.sqrt(TRIALS)
    assert before > 5 * noise
    assert abs(after) < 0.1 * before + 2 * noise
    # A standard deviation of 40 draws against the mean of 40 standard errors: within a third, three times its spread.
    assert float(found.std()) == pytest.approx(sum(said) / TRIALS, rel=0.35)


def _renamed(ours, reference, groups):
    return {"fd": FD_INFINITY.family(ours, reference, groups)["fd_infinity"]}


_AS_FD = type(FD_INFINITY)(**{**FD_INFINITY.__dict__, "family": _renamed})


def test_distances_on_a_line_meet_it_at_its_end_whatever_the_sizes_of_the_halves():
    halvings = [[(n, 3 + 40 / n), (100 - n, 3 + 40 / (100 - n))] for n in (50, 40, 55)]
    assert at_infinity(3 + 40 / 100, halvings) == pytest.approx(3, rel=1e-12)


def test_halvings_are_halves_of_which_none_repeats_another_or_its_rest():
    everything = frozenset(range(GROUPS))
    halves = [half for chosen in HALVINGS for half in (chosen, everything - chosen)]
    assert len(set(halves)) == len(halves)
    assert all(2 * len(half) == GROUPS for half in halves)


def test_leaving_out_a_group_leaves_it_out_of_every_half():
    drawn, real = _draw(_truth()[0], 0), _truth()[1]
    groups = group_of_each(COUNT)
    reference = FeatureSet({}, {"pool": real})
    found = FD_INFINITY.family(FeatureSet({"pool": drawn}), reference, groups)["fd_infinity"]
    for out in (0, 7):
        halvings = []
        for chosen in HALVINGS:
            inside = torch.isin(groups, torch.tensor(sorted(chosen)))
            halves = [drawn[inside & (groups != out)], drawn[~inside & (groups != out)]]
            halvings.append([(len(half), frechet_distance(Moments.of(half), real)) for half in halves])
        expected = at_infinity(frechet_distance(Moments.of(drawn[groups != out]), real), halvings)
        assert found.without[out] == pytest.approx(expected, rel=1e-8)


def test_the_number_is_the_same_with_and_without_its_uncertainty():
    ours, reference = FeatureSet({"pool": _draw(_truth()[0], 0)}), FeatureSet({}, {"pool": _truth()[1]})
    with_groups = FD_INFINITY.family(ours, reference, group_of_each(COUNT))["fd_infinity"]
    plain = FD_INFINITY.family(ours, reference, None)["fd_infinity"]
    assert plain.value == with_groups.value
    assert plain.without == ()


def test_too_few_images_are_refused_or_named():
    few = FeatureSet({"pool": torch.randn(19, 4)})
    with pytest.raises(DataError, match="10 groups of 2 at least, and these are 19"):
        FD_INFINITY.family(few, FeatureSet({"pool": torch.randn(19, 4)}), None)
    caution = FD_INFINITY.caution(FeatureSet({"pool": torch.zeros(127, 32)}), None)
    assert "127 images are fewer than 4 times the 32 features" in caution
    assert FD_INFINITY.caution(FeatureSet({"pool": torch.zeros(128, 32)}), None) == ""


def test_statistics_alone_do_not_do():
    stated = FeatureSet({}, {"pool": _truth()[0]})
    with pytest.raises(DataError, match="statistics alone do not do"):
        FD_INFINITY.family(stated, stated, None)
