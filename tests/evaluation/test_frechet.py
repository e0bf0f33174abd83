"""Frechet distances: closed forms, independent code, and few images."""

import math

import pytest
import scipy.linalg
import torch

from smalti.errors import DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.frechet import (
    FD,
    FD_PCA64,
    FID,
    SFID,
    distances_of_unions,
    frechet_distance,
    leave_out_unions,
)
from smalti.evaluation.metric import GROUPS, group_of_each
from smalti.evaluation.moments import Moments


def _rows(count, width, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) / math.sqrt(width)
    return torch.randn(count, width, generator=g) @ mix + shift


def _set(*args, **kwargs):
    return FeatureSet({"pool": _rows(*args, **kwargs)})


def _by_scipy(a, b):
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()) - 2 * root.trace().real


def test_gaussians_with_the_same_axes_are_as_far_as_their_means_and_standard_deviations():
    a, b = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 0.0]).double()
    ours = Moments(None, torch.tensor([0.0, 1.0, 2.0]).double(), torch.diag(a**2))
    real = Moments(None, torch.tensor([1.0, 1.0, 0.0]).double(), torch.diag(b**2))
    assert frechet_distance(ours, real) == pytest.approx(5 + float((a - b).square().sum()), rel=1e-14)


def test_one_dimension_works():
    ours, real = (Moments(None, torch.tensor([m]).double(), torch.tensor([[s]]).double()) for m, s in [(0, 4), (3, 1)])
    assert frechet_distance(ours, real) == pytest.approx(9 + 1, rel=1e-14)


@pytest.mark.parametrize(("count", "width"), [(500, 40), (2000, 100), (300, 1)])
def test_the_distance_is_that_of_scipy(count, width):
    ours, real = Moments.of(_rows(count, width)), Moments.of(_rows(count + 50, width, seed=1, shift=0.3))
    by_scipy = _by_scipy(ours, real) if width > 1 else None
    if by_scipy is None:  # scipy wants at least two rows here
        deviations = [moments.covariance.sqrt().item() for moments in (ours, real)]
        by_scipy = float((ours.mean - real.mean).square().sum()) + (deviations[0] - deviations[1]) ** 2
    assert frechet_distance(ours, real) == pytest.approx(by_scipy, rel=1e-6)


@pytest.mark.parametrize(("count", "width"), [(400, 24), (2000, 64)])
def test_the_distance_is_that_of_torchmetrics(count, width):
    from torchmetrics.image.fid import FrechetInceptionDistance

    ours, real = _rows(count, width), _rows(count, width, seed=1, shift=0.2)
    theirs = FrechetInceptionDistance(feature=_Flat(width), normalize=True, input_img_size=(1, 1, width))
    theirs.set_dtype(torch.float64)
    theirs.update(real[:, None, None].double(), real=True)
    theirs.update(ours[:, None, None].double(), real=False)
    found = FID.family(FeatureSet({"pool": ours}), FeatureSet({"pool": real}), None)["fid"].value
    assert found == pytest.approx(float(theirs.compute()), rel=1e-6)


class _Flat(torch.nn.Module):
    """Features that are the image itself."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, images):
        return images.flatten(1)


@pytest.mark.parametrize("count", [20, 39, 41, 90])
@pytest.mark.parametrize("real_count", [25, 300])
def test_few_images_take_another_way_to_the_same_distance(count, real_count):
    ours, real = _rows(count, 40), Moments.of(_rows(real_count, 40, seed=1))
    groups = group_of_each(count)
    found = distances_of_unions(FeatureSet({"pool": ours}), "pool", groups, leave_out_unions(), real)
    plain = [frechet_distance(Moments.of(ours), real)]
    plain += [frechet_distance(Moments.of(ours[groups != out]), real) for out in range(GROUPS)]
    # Both round in float64; the roots of eigenvalues near 0 carry half of the digits.
    assert found == pytest.approx(plain, rel=1e-7)


def test_a_distance_stays_the_same_when_the_features_are_rotated_or_the_sides_exchanged():
    ours, real = _rows(200, 16), _rows(150, 16, seed=1)
    q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    plain = frechet_distance(Moments.of(ours), Moments.of(real))
    turned = frechet_distance(Moments.of(ours.double() @ q), Moments.of(real.double() @ q))
    assert turned == pytest.approx(plain, rel=1e-9)
    assert frechet_distance(Moments.of(real), Moments.of(ours)) == pytest.approx(plain, rel=1e-9)


def _exact(ours, real):
    """From singular values of the features themselves, which no square has rounded."""
    centred = [(rows.double() - rows.double().mean(dim=0)) / (len(rows) - 1) ** 0.5 for rows in (ours, real)]
    small = [torch.linalg.qr(rows).R for rows in centred]
    gap = ours.double().mean(dim=0) - real.double().mean(dim=0)
    traces = float(sum(rows.square().sum() for rows in centred))
    overlap = float(torch.linalg.svdvals(small[0] @ small[1].T).sum())
    return float(gap.square().sum()) + traces - 2 * overlap, traces


@pytest.mark.parametrize("power", [1, 2, 3])
def test_variances_that_fall_steeply_cost_no_digits(power):
    spread = torch.arange(1, 129) ** -float(power)  # variances: 1 to 2e-13 at the steepest
    g = torch.Generator().manual_seed(0)
    ours, real = (torch.randn(600, 128, generator=g) * spread for _ in range(2))
    exact, traces = _exact(ours, real)
    assert exact < 0.05 * traces
    sets = FeatureSet({"pool": ours}), FeatureSet({"pool": real})
    # 128 singular values, each right to a few eps of the largest.
    within = 1e-14 * traces
    assert abs(frechet_distance(*(side.moments("pool") for side in sets)) - exact) <= within
    found = FD.family(*sets, group_of_each(600))["fd"]
    assert abs(found.value - exact) <= 20 * within  # moments merged from ten groups round more often
    for out in (0, 9):
        left = _exact(ours[group_of_each(600) != out], real)
        assert abs(found.without[out] - left[0]) <= 1e-6 * left[1]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_distance_grows_with_the_square_of_the_unit(scale):
    ours, real = _rows(200, 16).double(), _rows(150, 16, seed=1).double()
    plain = frechet_distance(Moments.of(ours), Moments.of(real))
    scaled = frechet_distance(Moments.of(ours * scale), Moments.of(real * scale))
    assert scaled == pytest.approx(plain * scale**2, rel=1e-9)


def test_leading_axes_of_the_reference_are_all_that_the_pca_distance_sees():
    spread = torch.cat([torch.full((64,), 3.0), torch.full((36,), 0.1)])
    g = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 100, generator=g) * spread
    ours = torch.randn(4000, 100, generator=g) * spread
    ours[:, 64:] += 5.0
    sets = FeatureSet({"pool": ours}), FeatureSet({"pool": real})
    assert FD.family(*sets, None)["fd"].value > 36 * 25
    kept = FeatureSet({"pool": ours[:, :64]}), FeatureSet({"pool": real[:, :64]})
    near = FD.family(*kept, None)["fd"].value
    # The axes are turned a little out of the first 64 by what 4,000 images leave to chance.
    assert FD_PCA64.family(*sets, None)["fd_pca64"].value == pytest.approx(near, rel=0.05)


def test_statistics_of_our_images_do_for_the_distances():
    ours, real = _set(300, 80), _set(400, 80, seed=1)
    stated = FeatureSet({}, {"pool": ours.moments("pool")})
    for metric, name in [(FD, "fd"), (FD_PCA64, "fd_pca64")]:
        from_rows = metric.family(ours, real, None)[name]
        from_statistics = metric.family(stated, FeatureSet({}, {"pool": real.moments("pool")}), None)[name]
        assert from_statistics.value == pytest.approx(from_rows.value, rel=1e-9)


def test_fewer_reference_images_than_axes_are_refused():
    with pytest.raises(DataError, match="at least 65 reference images, this has 64"):
        FD_PCA64.family(_set(100, 80), _set(64, 80), None)


def test_features_fewer_than_axes_need_as_many_reference_images_as_they_are():
    ours, real = _set(100, 12), _set(13, 12, seed=1)
    whole = FD.family(ours, real, None)["fd"].value
    assert FD_PCA64.family(ours, real, None)["fd_pca64"].value == pytest.approx(whole, rel=1e-9)
    with pytest.raises(DataError, match="12 principal axes need at least 13 reference images, this has 12"):
        FD_PCA64.family(ours, _set(12, 12), None)


def test_float32_features_with_a_large_mean_keep_their_digits():
    ours, real = _rows(300, 20), _rows(400, 20, seed=1, shift=0.2)
    # Multiples of 2^-9: exact in float32 beside 4096, so that the shifted features are the same ones.
    ours, real = ((512 * rows).round() / 512 for rows in (ours, real))
    plain = FD.family(FeatureSet({"pool": ours}), FeatureSet({"pool": real}), None)["fd"].value
    shifted = FD.family(FeatureSet({"pool": ours + 4096}), FeatureSet({"pool": real + 4096}), None)["fd"].value
    assert shifted == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("metric", [FID, FD_PCA64], ids=lambda metric: metric.label)
@pytest.mark.parametrize("count", [7, 100])
def test_features_of_another_network_are_refused(metric, count):
    with pytest.raises(DataError, match="have 10 features each and the reference 12"):
        metric.family(_set(count, 10), _set(100, 12), None)


def test_one_image_is_refused():
    with pytest.raises(DataError, match="1 images have no covariance"):
        FID.family(_set(1, 10), _set(100, 10), None)


def test_fewer_images_than_features_are_named_with_what_it_does():
    caution = FD.caution(_set(30, 40), _set(20, 40))
    assert "30 images and 20 reference images for 40 features" in caution
    assert "too large" in caution
    assert FD.caution(_set(41, 40), _set(50, 40)) == ""
    assert "\n" not in caution


def test_fid_says_that_papers_take_50000_images_and_statistics_without_a_count_say_nothing():
    assert FID.caution(_set(50, 40), _set(50, 40)).startswith("papers take 50,000 images, these are 50")
    moments = _set(50, 40).moments("pool")
    stated = FeatureSet({}, {"pool": Moments(None, moments.mean, moments.covariance)})
    assert FID.caution(stated, stated) == ""


def test_sfid_takes_the_spatial_features():
    ours, real = _rows(90, 14), _rows(80, 14, seed=1)
    sets = FeatureSet({"spatial": ours}), FeatureSet({"spatial": real})
    expected = frechet_distance(Moments.of(ours), Moments.of(real))
    assert SFID.family(*sets, None)["sfid"].value == pytest.approx(expected, rel=1e-12)
