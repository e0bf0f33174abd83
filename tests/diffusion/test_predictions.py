"""Every prediction says the same about x0 and eps when it is right."""

import pytest
import torch

from smalti.diffusion import PREDICTIONS, SCHEDULES, add_noise, build_schedule, to_denoised
from smalti.diffusion.levels import Level, level_batch
from smalti.diffusion.prediction import training_target
from smalti.errors import ConfigError


def pair(rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, 3, 4, 5, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_reads_back_as_the_x0_and_eps_it_was_made_of(prediction, schedule):
    x0, eps = pair()
    levels = build_schedule(schedule).levels(10)
    for place, level in enumerate(levels[:-1]):
        if level.alpha == 0 and prediction == "eps":
            continue
        if schedule == "flow":
            here = build_schedule("flow").at(torch.tensor([level.sigma], dtype=torch.float64))
        else:
            here = level_batch(levels, torch.tensor([9 - place]))
        x_t = add_noise(x0, eps, here)
        got = to_denoised(training_target(prediction, x0, eps, here), x_t, level, prediction)
        # Rounding is magnified by 1 / alpha when x0 is read from noise, and by 1 / sigma the other way.
        tolerance = 16 * torch.finfo(torch.float64).eps / min(max(level.alpha, 1e-9), level.sigma)
        tolerance = tolerance if level.alpha > 0 else 1e-14
        torch.testing.assert_close(got.x0, x0, rtol=0, atol=4 * tolerance)
        torch.testing.assert_close(got.eps, eps, rtol=0, atol=4 * tolerance)
        assert got.mix is None


def test_targets_are_what_their_names_say():
    x0, eps = pair()
    here = level_batch(build_schedule("cosine").levels(10), torch.tensor([4]))
    alpha, sigma = here.alpha.item(), here.sigma.item()
    for prediction, expected in {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}.items():
        torch.testing.assert_close(training_target(prediction, x0, eps, here), expected)


def test_flow_noises_along_the_straight_line():
    x0, eps = pair(rows=3)
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    x_t = add_noise(x0, eps, build_schedule("flow").at(t))
    torch.testing.assert_close(x_t, x0 + t.view(3, 1, 1, 1) * (eps - x0))


def test_variance_channels_become_the_mix_of_their_two_bounds():
    x0, _ = pair()
    variance = torch.full_like(x0, -1.0)
    variance[:, 0] = 1.0
    level = Level(500.0, 0.6, 0.8)
    got = to_denoised(torch.cat([x0, variance], 1), x0, level, "x0", learned_variance=True)
    assert torch.equal(got.mix[:, 0], torch.ones_like(got.mix[:, 0]))
    assert torch.equal(got.mix[:, 1:], torch.zeros_like(got.mix[:, 1:]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping_keeps_the_input_explained(prediction):
    output, x_t = pair(seed=3)
    level = Level(500.0, 0.6, 0.8)
    free = to_denoised(output, x_t, level, prediction)
    clipped = to_denoised(output, x_t, level, prediction, clip_x0=True)
    assert free.x0.abs().max() > 1
    assert torch.equal(clipped.x0, free.x0.clamp(-1, 1))
    for got in (free, clipped):
        torch.testing.assert_close(level.alpha * got.x0 + level.sigma * got.eps, x_t)


def test_low_precision_outputs_are_read_in_the_precision_of_the_latents():
    output, x_t = pair()
    got = to_denoised(output.bfloat16(), x_t.float(), Level(500.0, 0.6, 0.8), "v")
    assert got.x0.dtype == got.eps.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Level(1000.0, 0.0, 1.0), "eps", False), "cannot tell x0 from pure noise"),
        ((Level(500.0, 0.6, 0.8), "noise", False), "unknown prediction 'noise'"),
        ((Level(500.0, 0.6, 0.8), "eps", True), "gave 3 channels for 3 latent channels; expected 6"),
    ],
)
def test_what_cannot_be_read_says_why(arguments, message):
    level, prediction, learned = arguments
    with pytest.raises(ConfigError, match=message):
        to_denoised(*pair(), level, prediction, learned_variance=learned)
