"""KID: the formula written out, blocks, independent code, and that it is unbiased."""

import itertools
import math

import pytest
import torch

from smalti.errors import DataError
from smalti.evaluation import kid as module
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.kid import KID, kid
from smalti.evaluation.metric import GROUPS, group_of_each


def _rows(count, width, seed=0, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def _plain(x, y):
    x, y = x.double(), y.double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy = kernel(x, x), kernel(y, y)
    among = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(among - 2 * kernel(x, y).mean())


@pytest.mark.parametrize(("n", "m", "width"), [(2, 3, 1), (100, 70, 16), (130, 257, 40)])
def test_kid_is_the_formula_and_does_not_depend_on_the_blocks(n, m, width, monkeypatch):
    x, y = _rows(n, width), _rows(m, width, seed=1, shift=0.2)
    exact = _plain(x, y)
    scale = float(((x.double() @ y.double().T / width + 1) ** 3).abs().mean())
    for rows in (13, 64, 2048):
        monkeypatch.setattr(module, "_ROWS", rows)
        assert abs(kid(x, y) - exact) <= 1e-12 * scale


def test_large_features_keep_their_digits():
    x, y = _rows(200, 64, shift=30.0), _rows(300, 64, seed=1, shift=30.0)
    scale = (30.0**2 + 1) ** 3  # of the kernel
    assert abs(kid(x, y) - _plain(x, y)) <= 1e-12 * scale


def test_kid_is_that_of_torchmetrics_on_one_subset_of_all():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = _rows(150, 24), _rows(150, 24, seed=1, shift=0.3)
    with pytest.warns(UserWarning, match="large memory footprint"):
        theirs = KernelInceptionDistance(feature=_Flat(24), subsets=1, subset_size=150, normalize=True)
    theirs.set_dtype(torch.float64)
    theirs.update(y[:, None, None].double(), real=True)
    theirs.update(x[:, None, None].double(), real=False)
    assert kid(x, y) == pytest.approx(float(theirs.compute()[0]), rel=1e-8)


class _Flat(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, images):
        return images.flatten(1)


def test_the_mean_over_all_pairs_of_subsets_which_others_draw_from_is_this_number():
    x, y = _rows(6, 4), _rows(5, 4, seed=1, shift=0.5)
    chosen = itertools.product(*(itertools.combinations(range(n), 3) for n in (6, 5)))
    means = [kid(x[list(i)], y[list(j)]) for i, j in chosen]
    assert sum(means) / len(means) == pytest.approx(kid(x, y), rel=1e-10)


def test_a_set_against_itself_is_below_zero_and_copies_of_one_image_have_their_number():
    x = _rows(50, 8)
    assert kid(x, x) < 0  # each image meets itself across, and not among its own
    same, zero = torch.ones(20, 8), torch.zeros(20, 8)
    assert kid(same, zero) == pytest.approx(2**3 + 1 - 2, rel=1e-12)
    assert kid(same, same) == pytest.approx(0, abs=1e-12)


def test_draws_of_one_distribution_score_zero_in_the_mean_however_few():
    found = torch.tensor([kid(_rows(5, 8, seed=2 * i), _rows(7, 8, seed=2 * i + 1)) for i in range(400)])
    assert abs(float(found.mean())) <= 4 * float(found.std()) / math.sqrt(400)
    assert (found < 0).any()


def test_leaving_out_needs_no_second_pass_and_is_the_estimate_of_the_rest():
    x, y = _rows(101, 12), _rows(80, 12, seed=1, shift=0.2)
    groups = group_of_each(101)
    found = KID.family(FeatureSet({"pool": x}), FeatureSet({"pool": y}), groups)["kid"]
    assert found.value == pytest.approx(_plain(x, y), rel=1e-10)
    assert found.without == pytest.approx([_plain(x[groups != out], y) for out in range(GROUPS)], rel=1e-10)


@pytest.mark.parametrize(
    ("n", "m", "widths", "says"),
    [
        (1, 9, (4, 4), "at least 2 images a side, not 1 and 9"),
        (9, 9, (4, 5), "have 4 features each and the reference 5"),
    ],
)
def test_what_cannot_be_compared_gets_one_line(n, m, widths, says):
    with pytest.raises(DataError, match=says):
        kid(_rows(n, widths[0]), _rows(m, widths[1]))
