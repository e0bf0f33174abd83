"""Schedules as lists of levels: numbers worked out by hand, and laws that any schedule keeps."""

import math
from itertools import pairwise

import pytest
import torch

from smalti.diffusion import CLEAN, SCHEDULES, Level, build_schedule
from smalti.diffusion.levels import level_batch, posterior, step_variance
from smalti.diffusion.spacing import SPACINGS, respaced_indices, strided_indices, uniform_indices
from smalti.errors import ConfigError

CHAINS = ("linear", "cosine")


def alphas_sigmas(levels):
    return [(level.alpha, level.sigma) for level in levels]


def test_the_papers_250_steps_visit_0_4_8_to_999():
    indices = [level.timestep for level in build_schedule("linear").levels(250)[:-1]]
    assert indices[-4:] == [12, 8, 4, 0]
    assert indices[0] == 999


def test_sections_keep_both_their_ends():
    assert respaced_indices(20, [2, 3]) == [0, 9, 10, 14, 19]  # 10 + 4.5 rounds to the even 14
    assert respaced_indices(10, [1, 1]) == [0, 5]
    levels = build_schedule("linear").levels(30, spacing="10,10,10")
    assert [levels[0].timestep, levels[-2].timestep, len(levels)] == [999, 0, 31]


def test_strides_start_at_the_clean_end_and_uniform_steps_end_at_noise():
    assert strided_indices(1000, 4) == [0, 250, 500, 750]
    assert strided_indices(10, 5) == [0, 2, 4, 6, 8]
    assert uniform_indices(10, 5) == [1, 3, 5, 7, 9]
    assert uniform_indices(1000, 1) == [999]


@pytest.mark.parametrize("schedule", CHAINS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [2, 10, 50, 250, 1000])
def test_every_spacing_gives_that_many_falling_levels(schedule, spacing, count):
    levels = build_schedule(schedule).levels(count, spacing=spacing)
    assert len(levels) == count + 1
    assert levels[-1] == CLEAN
    for now, cleaner in pairwise(levels):
        assert now.sigma > cleaner.sigma
        assert now.alpha < cleaner.alpha
        assert now.log_snr < cleaner.log_snr
        assert now.alpha**2 + now.sigma**2 == pytest.approx(1, abs=4e-16)
    assert all(now.timestep > cleaner.timestep for now, cleaner in pairwise(levels[:-1]))


def test_log_snr_spacing_is_even_where_the_chain_is_fine():
    levels = build_schedule("linear").levels(20, spacing="log_snr")
    steps = torch.tensor([b.log_snr - a.log_snr for a, b in pairwise(levels[:-1])])
    fine = steps[:14]
    assert (fine - fine.mean()).abs().max() < 0.06 * fine.mean()


def test_flow_levels_run_straight_from_pure_noise_to_clean():
    levels = build_schedule("flow").levels(4)
    assert alphas_sigmas(levels) == [(0, 1), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1, 0)]
    assert [level.timestep for level in levels] == [1000, 750, 500, 250, 0]
    assert levels[0].log_snr == -math.inf
    assert CLEAN.log_snr == math.inf
    assert levels[2].log_snr == 0


def test_flow_shift_moves_levels_towards_noise_and_keeps_the_ends():
    shifted = build_schedule("flow").levels(4, shift=3.0)
    assert [level.sigma for level in shifted] == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert [level.timestep for level in shifted] == pytest.approx([1000 * level.sigma for level in shifted])


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_draws_the_levels_that_sampling_lists(name):
    schedule = build_schedule(name, 1000)
    levels = schedule.levels(1000)
    uniforms = torch.arange(1000, dtype=torch.float64) / 1000
    drawn = schedule.at(uniforms)
    # A chain's first draw is its cleanest noisy level, flow's is the clean end; both stop one short of where u = 1 is.
    levels = levels[1:] if name == "flow" else levels[:-1]
    expected = torch.tensor([(x.timestep, x.alpha, x.sigma) for x in reversed(levels)], dtype=torch.float64)
    got = torch.stack([drawn.timesteps, drawn.alpha, drawn.sigma], 1)
    assert got.dtype == torch.float64
    # Listed chains multiply their betas up once more: 1e-11 at the end of the cosine schedule.
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_largest_number_below_1_and_0_are_legal_draws(name):
    drawn = build_schedule(name).at(torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64))
    assert torch.isfinite(torch.stack([drawn.timesteps, drawn.alpha, drawn.sigma])).all()
    assert (drawn.sigma > 0).all()
    assert drawn.timesteps[0] < 1e-9
    assert drawn.timesteps[1] >= 999


@pytest.mark.parametrize("name", CHAINS)
def test_a_batch_holds_the_chain_around_each_sample(name):
    levels = build_schedule(name).levels(50)
    batch = level_batch(levels, torch.tensor([0, 1, 49]))
    for row, place in enumerate((49, 48, 0)):
        now, cleaner = levels[place], levels[place + 1]
        assert (batch.alpha[row].item(), batch.sigma[row].item()) == (now.alpha, now.sigma)
        assert (batch.previous_alpha[row].item(), batch.previous_sigma[row].item()) == (cleaner.alpha, cleaner.sigma)
        beta = step_variance(now.alpha, now.sigma, cleaner.alpha, cleaner.sigma)
        assert batch.max_log_variance[row].item() == pytest.approx(math.log(beta), abs=1e-12)
    # The cleanest level's posterior has no spread; the next one's stands in.
    assert batch.min_log_variance[0] == batch.min_log_variance[1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_agrees_with_bayes_rule_for_normal_data(name):
    # For x0 ~ N(0, 1) every marginal is N(0, alpha^2 + sigma^2): mixing the posterior over x0 given x_t must give it.
    for now, cleaner in pairwise(build_schedule(name).levels(10)[:-1]):
        x_weight, x0_weight, variance = posterior(now, cleaner)
        total = now.alpha**2 + now.sigma**2
        mean, x0_variance = now.alpha / total, now.sigma**2 / total
        got = (x_weight + x0_weight * mean) ** 2 * total + x0_weight**2 * x0_variance + variance
        assert got == pytest.approx(cleaner.alpha**2 + cleaner.sigma**2, rel=1e-12)
        assert 0 < variance < step_variance(now.alpha, now.sigma, cleaner.alpha, cleaner.sigma)


def test_posterior_from_pure_noise_forgets_x_t():
    assert posterior(Level(1000.0, 0.0, 1.0), Level(500.0, 0.5, 0.5)) == (0.0, 0.5, 0.25)


def test_a_chain_of_one_level_has_a_finite_variance():
    batch = level_batch(build_schedule("linear").levels(1, spacing="uniform"), torch.tensor([0]))
    assert torch.isfinite(batch.min_log_variance).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_schedule("cosin"), "unknown schedule 'cosin'; did you mean 'cosine'?"),
        (lambda: build_schedule("linear", 10), "at least 21 timesteps"),
        (lambda: build_schedule("flow", 1), "at least 2"),
        (lambda: build_schedule("linear").levels(1001), "use 1 to 1000"),
        (lambda: build_schedule("linear").levels(0), "use 1 to 1000"),
        (lambda: build_schedule("linear").levels(300, spacing="ddim"), "no integer stride takes 300 steps"),
        (lambda: build_schedule("linear").levels(5, spacing="log_snrs"), "did you mean 'log_snr'?"),
        (lambda: build_schedule("linear").levels(5, spacing="2,2"), "makes 4 steps, but num_inference_steps is 5"),
        (lambda: build_schedule("linear").levels(5, spacing="2,x"), "not a list of step counts"),
        (lambda: build_schedule("linear").levels(602, spacing="600,1,1"), "a section of 334 levels cannot give 600"),
        (lambda: build_schedule("linear").levels(5, shift=2.0), "moves flow levels only"),
        (lambda: build_schedule("flow").levels(5, spacing="respaced"), "choose 'uniform'"),
        (lambda: build_schedule("flow").levels(0), "at least 1"),
        (lambda: build_schedule("flow").levels(5, shift=0.0), "shift must be above 0"),
        (lambda: level_batch(build_schedule("linear").levels(5), torch.tensor([5])), "use 0 to 4"),
    ],
)
def test_wrong_settings_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        call()
