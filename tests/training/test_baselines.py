"""The lines to beat, against the filter written out as one matrix, and against what is known for Gaussian data."""

import numpy as np
import pytest
import torch
from tiny_runs import array_images, write_set

from smalti.data import load_image_set, split
from smalti.data.examples import PixelExamples
from smalti.data.pixels import read_images
from smalti.diffusion.levels import build_schedule
from smalti.diffusion.prediction import PREDICTIONS
from smalti.training.baselines import SHRINKAGE, Moments, baselines, example_moments, linear_denoiser_loss
from smalti.training.validation import STRATA, loss_of, make_triples

SIDE, PIXELS = 2, 12


def covariance():
    """Of 12 pixel values, with a standard deviation of 0.25 and strong correlations of many kinds."""
    mixing = torch.randn(PIXELS, PIXELS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    c = mixing @ mixing.T + 0.2 * torch.eye(PIXELS, dtype=torch.float64)
    scale = c.diagonal().sqrt()
    return c / scale / scale[:, None] * 0.25**2


def mean_image():
    return torch.linspace(-0.2, 0.2, PIXELS, dtype=torch.float64)


def gaussian_images(count, seed):
    """8-bit images drawn from N(mean_image, covariance); four standard deviations fit into the range."""
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, PIXELS)))
    values = mean_image() + noise @ torch.linalg.cholesky(covariance()).T
    pixels = (values * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return array_images(pixels.reshape(count, 3, SIDE, SIDE).permute(0, 2, 3, 1).contiguous().numpy())


def triples_of(images, kind, count=None):
    return make_triples(PixelExamples(images), list(range(count or len(images))), build_schedule(kind, 1000), seed=0)


def loss_of_estimate(x0, triples, prediction):
    """Of a denoiser's estimate of the clean image, with the noise that follows from it."""
    alpha, sigma = triples.levels.alpha[:, None], triples.levels.sigma[:, None]
    x_t = alpha * triples.x0.flatten(1).double() + sigma * triples.eps.flatten(1).double()
    a, b = PREDICTIONS[prediction](alpha, sigma)
    output = a * x0 + b * (x_t - alpha * x0) / sigma
    return loss_of(output.view(triples.x0.shape), triples, prediction)


def wiener(mean, cov, triples):
    """One explicit matrix per triple."""
    estimates = []
    for k in range(len(triples)):
        alpha, sigma = triples.levels.alpha[k], triples.levels.sigma[k]
        x_t = alpha * triples.x0[k].flatten().double() + sigma * triples.eps[k].flatten().double()
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=torch.float64))
        estimates.append(mean + gain @ (x_t - alpha * mean))
    return torch.stack(estimates)


def test_the_moments_are_the_mean_and_the_covariance_of_the_images():
    images = gaussian_images(300, 0)
    moments = example_moments(PixelExamples(images), list(range(0, 300, 2)))
    x = read_images(images, range(0, 300, 2)).flatten(1).double()
    assert torch.allclose(moments.mean, x.mean(0), atol=1e-12)
    assert torch.allclose(moments.axes @ moments.variances.diag() @ moments.axes.T, torch.cov(x.T), atol=1e-12)
    assert torch.allclose(moments.axes.T @ moments.axes, torch.eye(PIXELS, dtype=torch.float64), atol=1e-9)


def test_with_fewer_images_than_pixels_the_axes_span_what_the_images_vary_in():
    images = gaussian_images(5, 0)
    moments = example_moments(PixelExamples(images), [0, 1, 2, 3, 3, 4])
    assert moments.axes.shape == (PIXELS, 4)  # five different images, less the mean
    x = read_images(images, [0, 1, 2, 3, 3, 4]).flatten(1).double()
    assert torch.allclose(moments.axes @ moments.variances.diag() @ moments.axes.T, torch.cov(x.T), atol=1e-12)


def test_one_image_alone_has_no_axes_and_the_lines_are_still_numbers():
    moments = example_moments(PixelExamples(gaussian_images(3, 0)), [1])
    assert moments.axes.shape == (PIXELS, 0)
    lines = baselines(moments, triples_of(gaussian_images(4, 1), "flow"), "x0")
    assert lines.linear.mean == pytest.approx(lines.constant.mean)


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("count", [6, 60])
def test_both_lines_are_those_of_the_filter_written_as_a_matrix(kind, prediction, count):
    if kind == "flow" and prediction == "eps":
        pytest.skip("ObjectiveConfig refuses it: the start of the path has no signal")
    moments = example_moments(PixelExamples(gaussian_images(count, 1)), list(range(count)))
    triples = triples_of(gaussian_images(9, 2), kind)
    lines = baselines(moments, triples, prediction)
    constant = loss_of_estimate(moments.mean.expand(len(triples), -1), triples, prediction)
    # Float32 noise images against float64 ones: their rounding, enlarged by 1 / sigma near the clean end for eps.
    near = {"rel": 1e-4, "abs": 1e-9}
    assert lines.constant.strata == pytest.approx(constant.strata, **near)
    assert lines.constant.mean == pytest.approx(constant.mean, **near)
    cov = moments.axes @ moments.variances.diag() @ moments.axes.T
    average = cov.trace() / PIXELS * torch.eye(PIXELS, dtype=torch.float64)
    by_share = {
        share: loss_of_estimate(wiener(moments.mean, (1 - share) * cov + share * average, triples), triples, prediction)
        for share in SHRINKAGE
    }
    for k in range(STRATA):
        assert lines.linear.strata[k] == pytest.approx(min(loss.strata[k] for loss in by_share.values()), **near)
        assert by_share[lines.shrinkage[k]].strata[k] == pytest.approx(lines.linear.strata[k], **near)
    assert lines.linear.mean == pytest.approx(sum(lines.linear.strata) / STRATA)


@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
def test_on_emoji_the_filter_is_below_the_mean_image_in_every_eighth(tmp_path, prediction):
    images = load_image_set(write_set(tmp_path, 200))
    parts = split(images, 0.125, 0)
    triples = make_triples(PixelExamples(images), parts.validation.tolist(), build_schedule("flow", 1000), seed=0)
    lines = baselines(example_moments(PixelExamples(images), parts.train.tolist()), triples, prediction)
    assert all(linear <= constant for linear, constant in zip(lines.linear.strata, lines.constant.strata, strict=True))
    assert lines.linear.mean < 0.7 * lines.constant.mean


def test_the_constant_line_does_not_depend_on_the_noise_for_x0():
    images = gaussian_images(16, 5)
    moments = example_moments(PixelExamples(gaussian_images(50, 6)), list(range(50)))
    lines = baselines(moments, triples_of(images, "flow"), "x0")
    x = read_images(images, range(16)).flatten(1).double()
    assert lines.constant.mean == pytest.approx((x - moments.mean).square().mean().item(), rel=1e-6)


def test_the_filter_becomes_the_exact_posterior_mean_of_gaussian_data_as_images_grow():
    """The excess loss over the true filter falls as 1 / images; the 8-bit rounding adds 1e-5 of variance."""
    triples = triples_of(gaussian_images(256, 7), "flow")
    rounding = torch.eye(PIXELS, dtype=torch.float64) / 127.5**2 / 12
    exact = loss_of_estimate(wiener(mean_image(), covariance() + rounding, triples), triples, "x0")
    images = gaussian_images(1200, 8)
    excess = []
    for count in (30, 200, 1200):
        loss, _ = linear_denoiser_loss(example_moments(PixelExamples(images), list(range(count))), triples, "x0")
        excess.append(loss.mean / exact.mean - 1)
    assert excess[0] > 0.03
    assert excess[0] > 3 * abs(excess[1])
    assert abs(excess[2]) < 2 * (PIXELS + 1) / 1200
    # the middle of the path, where the filter does most
    assert loss.strata[3:6] == pytest.approx(exact.strata[3:6], rel=0.02)


def test_what_is_true_of_the_data_is_true_of_the_line():
    """With the true moments in hand and no shrinkage needed, the line is the true filter's loss to the last digits."""
    values, axes = torch.linalg.eigh(covariance())
    triples = triples_of(gaussian_images(64, 9), "flow")
    loss, shares = linear_denoiser_loss(Moments(mean_image(), axes, values), triples, "x0")
    exact = loss_of_estimate(wiener(mean_image(), covariance(), triples), triples, "x0")
    assert all(ours <= true * (1 + 1e-6) for ours, true in zip(loss.strata, exact.strata, strict=True))
    for k in range(STRATA):
        if shares[k] == 0:
            assert loss.strata[k] == pytest.approx(exact.strata[k], rel=1e-6)
    assert 0 in shares
