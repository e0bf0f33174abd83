"""How often intervals of real metrics hold the value they are about. docs/numbers.md has the longer runs."""

import pytest
import torch

from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import measure
from smalti.evaluation.metrics import METRICS

NAMES = ("fd_pca64", "fd_infinity", "kid", "precision", "recall", "density", "coverage")
WIDTH, COUNT, TRIALS = 16, 200, 40


def _draw(count, seed, spread=1.0, shift=0.0):
    """A mixture of eight Gaussians: not round, not one Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(99))
    away = torch.randn(count, WIDTH, generator=generator) * torch.linspace(1.5, 0.3, WIDTH) * spread
    return FeatureSet({"pool": centres[torch.randint(0, 8, (count,), generator=generator)] + away + shift})


@pytest.fixture(scope="module")
def trials():
    real = _draw(300, 5)
    return [
        measure(_draw(COUNT, 1000 + seed, 0.8, 0.15), real, NAMES, METRICS, network="any") for seed in range(TRIALS)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_intervals_hold_the_mean_of_many_sets_of_as_many_images(trials, name):
    found = [trial[name] for trial in trials]
    values = torch.tensor([estimate.value for estimate in found], dtype=torch.float64)
    mean = float(values.mean())
    held = sum(estimate.low <= mean <= estimate.high for estimate in found)
    # 95 % of 40 are 38; 33 or fewer, 1 in 200, promise too much.
    assert held >= 34
    said = sum(estimate.standard_error for estimate in found) / TRIALS
    # The jackknife errs on the wide side. The spread of 40 values is itself known to 11 %.
    assert 0.75 < said / float(values.std()) < 1.6
