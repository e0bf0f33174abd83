"""FID and sFID against the numbers of the ADM suite."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.evaluation.features import FeatureSet
from smalti.evaluation.frechet import FID, frechet_distance
from smalti.evaluation.moments import Moments

GOLDEN = Path(__file__).parents[1] / "data" / "parity"
CASES = json.loads((GOLDEN / "index_metrics_moments.json").read_text())["files"]["metric_fid.safetensors"]["cases"]
TENSORS = load_file(GOLDEN / "metric_fid.safetensors")


def _rows(case):
    return [TENSORS[f"{case}.input.activations_{side}"].flatten(1) for side in (1, 2)]


def _moments(case):
    return [Moments.of(rows) for rows in _rows(case)]


def _stated(case):
    """Moments as a file of statistics gives them: whose count nobody knows."""
    return [Moments(None, moments.mean, moments.covariance) for moments in _moments(case)]


# The stated exact value takes the roots of rounded zeros for real: 7e-7, by singular values in float64 (below).
ROUNDED = "low_rank_same_subspace"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("moments", [_moments, _stated], ids=["counted", "stated"])
def test_the_distance_is_that_of_the_suite(case, moments):
    found = frechet_distance(*moments(case))
    if case != ROUNDED:
        # Where the truth is 0, rounding of traces below 100 is all that is left.
        assert found == pytest.approx(CASES[case]["fid_exact_eig"], rel=1e-6, abs=1e-12)
    if (official := CASES[case]["fid_official"]) is not None:
        assert found == pytest.approx(official, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case != "identical_sets"])
def test_the_distance_is_that_of_singular_values_which_rounding_leaves_alone(case):
    centred = [(rows.double() - rows.double().mean(dim=0)) / (len(rows) - 1) ** 0.5 for rows in _rows(case)]
    gap = _rows(case)[0].double().mean(dim=0) - _rows(case)[1].double().mean(dim=0)
    overlap = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    exact = float(gap.square().sum() + sum(rows.square().sum() for rows in centred) - 2 * overlap)
    # Eigenvalues below 9e-16 of the largest count as 0: 3e-8 of its root each.
    assert frechet_distance(*_moments(case)) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_the_metric_is_the_distance_whichever_way_it_takes(case):
    ours, reference = (FeatureSet({"pool": rows}) for rows in _rows(case))
    found = FID.family(ours, reference, None)["fid"].value
    assert found == pytest.approx(frechet_distance(*_moments(case)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", ["regular", "tiny_variances", "constant_features", "one_dimension"])
def test_moments_are_those_of_the_suite(case):
    for side, moments in enumerate(_moments(case), 1):
        scale = TENSORS[f"{case}.output.sigma_{side}"].abs().max()
        assert (moments.mean - TENSORS[f"{case}.output.mu_{side}"]).abs().max() <= 1e-6 * moments.mean.abs().max()
        # The suite gathers in float32 what it then centres.
        covariance = TENSORS[f"{case}.output.sigma_{side}"].reshape(moments.covariance.shape)
        assert (moments.covariance - covariance).abs().max() <= 1e-5 * scale


def test_the_epsilon_rule_gives_what_the_suite_gave_with_an_older_scipy():
    older = CASES["constant_features"]["fid_official_scipy_1_10_1"]
    assert older == pytest.approx(5.8545356, abs=1e-7)
    given = [
        Moments(
            None,
            TENSORS[f"constant_features.output.mu_{side}"].double(),
            TENSORS[f"constant_features.output.sigma_{side}"],
        )
        for side in (1, 2)
    ]
    assert frechet_distance(*given, epsilon=1e-6) == pytest.approx(older, rel=1e-7)
    assert frechet_distance(*given) == pytest.approx(CASES["constant_features"]["fid_official"], rel=1e-7)
    # The suite's mean of float32 features is itself float32.
    assert frechet_distance(*_moments("constant_features"), epsilon=1e-6) == pytest.approx(older, rel=1e-6)
