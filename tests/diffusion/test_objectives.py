"""Losses against closed forms, in float64."""

import math
from itertools import pairwise

import pytest
import torch

from smalti import streams
from smalti.config import from_dict, to_dict
from smalti.diffusion import (
    Denoised,
    Level,
    ObjectiveConfig,
    bits_per_dim,
    build_schedule,
    draw_levels,
    keyed_uniforms,
    losses_from_output,
    training_losses,
)
from smalti.diffusion.levels import level_batch, posterior
from smalti.diffusion.objectives import (
    discretized_gaussian_log_likelihood,
    min_snr_weights,
    normal_kl,
    prior_bits,
    variational_bound,
    velocity_weights,
)
from smalti.diffusion.prediction import add_noise, target_weights, training_target, x0_weights
from smalti.diffusion.timesteps import LossSecondMoment, logit_normal
from smalti.errors import ConfigError

ROWS = 6


def batch(seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, ROWS, channels, 4, 4, generator=generator, dtype=torch.float64).unbind()


def uniforms(seed=1, count=ROWS):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kl_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    m1, lv1, m2, lv2 = torch.randn(4, 50, generator=generator, dtype=torch.float64).unbind()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(m1, (lv1 / 2).exp()), normal(m2, (lv2 / 2).exp()))
    torch.testing.assert_close(normal_kl(m1, lv1, m2, lv2), expected)


def test_likelihoods_of_the_256_values_sum_to_one():
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.1, -2.0), (-0.999, -4.0), (0.5, 0.0)):
        means, scales = torch.full_like(values, mean), torch.full_like(values, log_scale)
        total = discretized_gaussian_log_likelihood(values, means, scales).exp().sum()
        assert total.item() == pytest.approx(1, abs=256 * 1e-12)


def test_a_perfect_network_has_no_simple_loss_under_any_prediction():
    x0, eps = batch()
    for prediction in ("eps", "x0", "v", "velocity"):
        config = ObjectiveConfig(prediction=prediction)
        levels = draw_levels(build_schedule("linear"), config, uniforms())
        perfect = training_target(prediction, x0, eps, levels)
        losses = losses_from_output(perfect, x0, eps=eps, levels=levels, config=config)
        assert torch.equal(losses.mse, torch.zeros(ROWS, dtype=torch.float64))
        assert losses.vb is None


def test_the_bound_of_a_perfect_network_vanishes_at_the_posterior_variance():
    x0, eps = batch()
    levels = level_batch(build_schedule("linear").levels(1000), torch.tensor([1, 10, 100, 500, 900, 999]))
    perfect = torch.cat([eps, torch.full_like(eps, -1.0)], 1)
    losses = losses_from_output(perfect, x0, eps=eps, levels=levels, config=ObjectiveConfig(), learned_variance=True)
    assert losses.vb.abs().max() < 1e-14
    # At the other end of the range, by the closed form of the KL between two centred normals.
    wide = torch.cat([eps, torch.ones_like(eps)], 1)
    losses = losses_from_output(wide, x0, eps=eps, levels=levels, config=ObjectiveConfig(), learned_variance=True)
    ratio = (levels.min_log_variance - levels.max_log_variance).exp()
    torch.testing.assert_close(losses.vb, 0.5 * (ratio - 1 - ratio.log()) / math.log(2))


def test_the_bound_sends_no_gradient_into_the_prediction():
    x0, eps = batch()
    output = torch.cat([eps + 0.1, 0.3 * eps], 1).requires_grad_()
    levels = level_batch(build_schedule("cosine").levels(1000), torch.tensor([0, 1, 5, 100, 500, 900]))
    losses = losses_from_output(output, x0, eps=eps, levels=levels, config=ObjectiveConfig(), learned_variance=True)
    losses.vb.sum().backward()
    assert torch.equal(output.grad[:, :3], torch.zeros_like(eps))
    assert (output.grad[:, 3:].flatten(1).abs().sum(1) > 0).all()


def test_the_bound_is_least_where_the_variance_fits_the_error():
    x0, _ = batch()
    levels = level_batch(build_schedule("linear").levels(100), torch.full((ROWS,), 5))
    error = torch.full_like(x0, 0.05)
    mix = torch.linspace(0, 1, ROWS, dtype=torch.float64).view(-1, 1, 1, 1).expand_as(x0).clone().requires_grad_()
    variational_bound(x0, error, levels, mix=mix).sum().backward()
    # Optimal variance = posterior variance + squared error of the mean; too small a mix wants up, too large down.
    weight = levels.previous_alpha[0] * levels.max_log_variance[0].exp() / levels.sigma[0] ** 2
    wanted = (levels.min_log_variance[0].exp() + (weight * 0.05) ** 2).log()
    best = (wanted - levels.min_log_variance[0]) / (levels.max_log_variance[0] - levels.min_log_variance[0])
    assert 0 < best < 1
    for row in range(ROWS):
        assert torch.sign(mix.grad[row].mean()) == torch.sign(mix[row, 0, 0, 0] - best)


def test_rows_at_the_cleanest_level_pay_for_8_bit_pixels():
    x0 = (torch.randint(0, 256, (ROWS, 1, 2, 2), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).double()
    levels = level_batch(build_schedule("linear").levels(1000), torch.tensor([0, 3, 0, 3, 3, 0]))
    error = torch.full_like(x0, 0.01)
    bound = variational_bound(x0, error, levels, variance="small")
    scale = 0.5 * levels.min_log_variance[0]
    expected = -discretized_gaussian_log_likelihood(x0, x0 + error, torch.full_like(x0, scale)).flatten(1).mean(1)
    first = levels.previous_sigma == 0
    torch.testing.assert_close(bound[first], expected[first] / math.log(2), rtol=1e-9, atol=0)
    assert (bound[~first] < 1).all()


def test_bits_per_dim_of_normal_data_are_its_negative_log_likelihood():
    # With the exact denoiser and the exact variance the reverse chain is the data's own, so the bound is tight.
    std, levels = 0.3, build_schedule("linear", 200).levels(200)
    cleaner = dict(pairwise(levels))

    def denoise(x, level):
        total = level.alpha**2 * std**2 + level.sigma**2
        x0 = level.alpha * std**2 / total * x
        here = level_batch(levels, torch.tensor([int(level.timestep)]))
        low, high = here.min_log_variance.item(), here.max_log_variance.item()
        _, x0_weight, variance = posterior(level, cleaner[level])
        wanted = math.log(variance + x0_weight**2 * std**2 * level.sigma**2 / total)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma, torch.full_like(x, (wanted - low) / (high - low)))

    generator = torch.Generator().manual_seed(0)
    x0 = (std * torch.randn(2, 1, 20, 20, generator=generator, dtype=torch.float64)).clamp(-0.99, 0.99)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1

    def balanced_noise(x):
        """Unit mean square and no correlation with the data, in each row exactly: leaves nothing to chance."""
        rows, noise = x0.flatten(1), torch.randn(x.shape, generator=generator, dtype=x.dtype).flatten(1)
        noise = noise - (noise * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True) * rows
        return (noise / noise.square().mean(1, keepdim=True).sqrt()).view_as(x)

    got = bits_per_dim(denoise, x0, levels, randn_like=balanced_noise)
    assert got.vb.shape == got.x0_mse.shape == got.eps_mse.shape == (2, 200)
    torch.testing.assert_close(got.total, got.prior + got.vb.sum(1))
    density = torch.distributions.Normal(0.0, std).log_prob(x0).flatten(1).mean(1)
    expected = -(density + math.log(2 / 255)) / math.log(2)
    # The last step's likelihood treats 8-bit values as if spread over their bins; measured 0.0008.
    torch.testing.assert_close(got.total, expected, rtol=0, atol=0.003)


def test_prior_bits_of_a_pixel_by_hand():
    x0 = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    expected = 0.5 * (0.8**2 + (0.6 * 0.5) ** 2 - 1 - math.log(0.8**2)) / math.log(2)
    assert prior_bits(x0, Level(9.0, 0.6, 0.8)).item() == pytest.approx(expected)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "velocity"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_min_snr_weighs_the_error_of_x0_alike_under_every_prediction(prediction, schedule):
    levels = build_schedule(schedule).at(uniforms(count=50))
    snr = (levels.alpha / levels.sigma) ** 2
    _, q = x0_weights(prediction, levels.alpha, levels.sigma)
    torch.testing.assert_close(min_snr_weights(prediction, levels, 5.0), snr.clamp(max=5) * q**2)


def test_min_snr_has_the_papers_three_forms():
    levels = build_schedule("cosine").at(uniforms(count=50))
    snr = (levels.alpha / levels.sigma) ** 2
    capped = snr.clamp(max=5)
    for prediction, expected in {"eps": capped / snr, "x0": capped, "v": capped / (snr + 1)}.items():
        torch.testing.assert_close(min_snr_weights(prediction, levels), expected)


def test_min_snr_enters_the_loss_and_not_the_reported_error():
    x0, eps = batch()
    config = ObjectiveConfig(loss_weighting="min_snr", prediction="v")
    levels = draw_levels(build_schedule("linear"), config, uniforms())
    losses = losses_from_output(x0, x0, eps=eps, levels=levels, config=config)
    torch.testing.assert_close(losses.loss, losses.mse * min_snr_weights("v", levels))


def test_flow_matching_trains_the_velocity_at_the_straight_line():
    x0, eps = batch()
    config = ObjectiveConfig(schedule="flow", prediction="velocity")
    levels = draw_levels(build_schedule("flow"), config, uniforms())
    seen = {}

    def backbone(latents, timesteps, class_labels):
        seen.update(latents=latents, timesteps=timesteps, class_labels=class_labels)
        return torch.zeros_like(latents)

    labels = torch.arange(ROWS)
    losses = training_losses(backbone, x0, labels, eps=eps, levels=levels, config=config)
    t = uniforms().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["latents"], (1 - t) * x0 + t * eps)
    torch.testing.assert_close(seen["timesteps"], (1000 * uniforms()).float())
    assert seen["class_labels"] is labels
    torch.testing.assert_close(losses.loss, (eps - x0).square().flatten(1).mean(1))


def test_float32_losses_agree_with_float64():
    x0, eps = batch()
    output = torch.cat([eps + 0.1 * x0, 0.3 * x0], 1)
    levels = level_batch(build_schedule("cosine").levels(1000), torch.tensor([0, 1, 5, 100, 500, 990]))

    def losses(dtype):
        given = {"eps": eps.to(dtype), "levels": levels, "config": ObjectiveConfig(), "learned_variance": True}
        return losses_from_output(output.to(dtype), x0.to(dtype), **given)

    exact, rounded = losses(torch.float64), losses(torch.float32)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        # The bound is a difference of logarithms up to 10 in size, each rounded.
        torch.testing.assert_close(b.double(), a, rtol=1e-5, atol=20 * torch.finfo(torch.float32).eps)


def test_uniform_draws_visit_every_index_alike_and_logit_normal_its_median():
    schedule = build_schedule("linear")
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = draw_levels(schedule, ObjectiveConfig(), grid).timesteps.long().bincount(minlength=1000)
    assert (counts == 4).all()
    flow = build_schedule("flow")
    config = ObjectiveConfig(
        schedule="flow", prediction="velocity", timestep_sampling="logit_normal", logit_mean=0.5, logit_std=1.0
    )
    times = draw_levels(flow, config, grid).sigma
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-9)  # the grid is symmetric
    assert logits.std().item() == pytest.approx(1.0, abs=2e-3)
    assert (times.diff() > 0).all()


def test_logit_normal_stays_inside_for_the_extreme_uniforms():
    got = logit_normal(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), 5.0, 10.0)
    assert (got >= 0).all()
    assert (got < 1).all()


def test_keyed_uniforms_depend_on_seed_stream_and_position_only():
    whole = keyed_uniforms(7, streams.TIMESTEP, range(8))
    assert torch.equal(torch.cat([keyed_uniforms(7, streams.TIMESTEP, r) for r in (range(3), range(3, 8))]), whole)
    assert not torch.equal(keyed_uniforms(7, streams.LABEL_DROP, range(8)), whole)
    assert not torch.equal(keyed_uniforms(8, streams.TIMESTEP, range(8)), whole)
    assert ((whole >= 0) & (whole < 1)).all()


def test_importance_sampling_keeps_the_expected_loss():
    sampler = LossSecondMoment(5, history_per_term=2)
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    for _ in range(2):
        sampler.update(torch.arange(5), losses)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    indices, weights = sampler.draw(grid)
    assert (losses[indices] * weights).mean().item() == pytest.approx(3.0, rel=1e-3)
    torch.testing.assert_close(sampler.probabilities(), losses / 15 * 0.999 + 0.0002)


def test_the_config_survives_a_file():
    config = ObjectiveConfig(schedule="flow", prediction="velocity", timestep_sampling="logit_normal")
    assert from_dict(ObjectiveConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "flow"}, "use 'velocity'"),
        ({"label_dropout": 1.5}, "between 0 and 1"),
        ({"logit_std": 0.0}, "above 0"),
        ({"min_snr_gamma": -1.0}, "above 0"),
        ({"variational_weight": -1.0}, "0 or more"),
    ],
)
def test_impossible_objectives_say_what_to_do(changes, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**changes)


def test_a_learned_variance_without_a_chain_says_what_to_do():
    x0, eps = batch()
    config = ObjectiveConfig(schedule="flow", prediction="velocity")
    levels = draw_levels(build_schedule("flow"), config, uniforms())
    with pytest.raises(ConfigError, match="use linear or cosine, or set learned_variance to false"):
        losses_from_output(torch.cat([x0, x0], 1), x0, eps=eps, levels=levels, config=config, learned_variance=True)
    levels = level_batch(build_schedule("linear").levels(10), torch.zeros(ROWS, dtype=torch.int64))
    with pytest.raises(ConfigError, match="needs a network with learned_variance"):
        variational_bound(x0, x0, levels)


@pytest.mark.parametrize("prediction", ["x0", "v", "velocity"])
def test_velocity_weighting_measures_any_prediction_as_velocity(prediction):
    generator = torch.Generator().manual_seed(0)
    x0, eps, guess = (torch.randn(6, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    levels = build_schedule("flow").at(torch.tensor([0.06, 0.2, 0.4, 0.6, 0.8, 0.99], dtype=torch.float64))
    x_t = add_noise(x0, eps, levels)
    alpha, sigma = (t[:, None, None, None] for t in (levels.alpha, levels.sigma))
    # the same wrong x0, said in each prediction's own words
    guessed_eps = (x_t - alpha * guess) / sigma
    a, b = target_weights(prediction, alpha, sigma)
    config = ObjectiveConfig(schedule="flow", prediction=prediction, loss_weighting="velocity")
    losses = losses_from_output(a * guess + b * guessed_eps, x0, eps=eps, levels=levels, config=config)
    expected = ((guessed_eps - guess) - (eps - x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.loss, expected, rtol=1e-9, atol=0)


def test_velocity_weighting_limits_sigma_near_clean_images():
    levels = build_schedule("flow").at(torch.tensor([1e-6, 0.01, 0.0499], dtype=torch.float64))
    weights = velocity_weights("x0", levels)
    assert weights.max() <= ((1 + 0.05) / 0.05) ** 2
