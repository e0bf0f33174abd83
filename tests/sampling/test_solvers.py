"""Samplers where the answer is known: normal data, whose denoiser and probability-flow ODE have closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from smalti.diffusion import CLEAN, Denoised, Level, build_schedule
from smalti.diffusion.levels import posterior, step_variance
from smalti.sampling import SAMPLERS, SamplingConfig, run_sampler
from smalti.sampling.ddim import ddim
from smalti.sampling.ddpm import ddpm
from smalti.sampling.dpm_solver import dpm_solver
from smalti.sampling.heun import heun

MEAN, STD = 0.7, 0.5
ORDERS = {"ddim": 1, "heun": 2, "dpm-solver++": 2}


def no_noise(x):
    raise AssertionError("a deterministic sampler asked for noise")


def spread(level, std=STD):
    """Standard deviation of the latents at a level."""
    return math.sqrt(level.alpha**2 * std**2 + level.sigma**2)


def gaussian(std=STD, mean=MEAN, mix=None):
    """The exact denoiser of normal data."""

    def denoise(x, level):
        x0 = mean + level.alpha * std**2 / spread(level, std) ** 2 * (x - level.alpha * mean)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma, None if mix is None else mix(x, level))

    return denoise


def exact(x, start, end):
    """Where the probability-flow ODE carries x: its place in the distribution stays."""
    return end.alpha * MEAN + spread(end) / spread(start) * (x - start.alpha * MEAN)


def path(schedule, steps):
    """Levels at equal distances in time between two fixed ones, so that only the step size differs."""
    if schedule == "flow":
        times = [1 - 0.95 * i / steps for i in range(steps + 1)]
        return [Level(1000 * t, 1 - t, t) for t in times]
    chain = build_schedule(schedule, 6400).levels(6400)[::-1][1:]  # clean end first
    first, last = {"linear": (6399, 399), "cosine": (6239, 239)}[schedule]
    return [chain[first - round((first - last) * i / steps)] for i in range(steps + 1)]


def final(sampler, denoise, x, levels, **options):
    return list(SAMPLERS[sampler].run(denoise, x, levels, **{"randn_like": no_noise, **options}))[-1]


def start_noise(rows=64):
    return torch.randn(rows, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("sampler", ORDERS)
def test_error_falls_with_the_order_of_the_solver(sampler, schedule):
    errors = []
    for steps in (80, 160, 320):
        levels = path(schedule, steps)
        got = final(sampler, gaussian(), start_noise(), levels)
        errors.append((got - exact(start_noise(), levels[0], levels[-1])).abs().max().item())
    order = math.log2(errors[-2] / errors[-1])
    assert ORDERS[sampler] - 0.25 < order < ORDERS[sampler] + 0.5, (order, errors)


@pytest.mark.parametrize("sampler", ORDERS)
def test_flow_keeps_its_order_from_pure_noise_to_clean(sampler):
    errors = []
    for steps in (80, 160, 320):
        levels = build_schedule("flow").levels(steps)
        got = final(sampler, gaussian(), start_noise(), levels)
        errors.append((got - exact(start_noise(), levels[0], CLEAN)).abs().max().item())
    order = math.log2(errors[-2] / errors[-1])
    # Steps of unbounded log-SNR cost DPM-Solver++ a logarithm: n^-2 log n has order 1.82 between 160 and 320 steps.
    assert ORDERS[sampler] - 0.25 < order < ORDERS[sampler] + 0.5, (order, errors)


@pytest.mark.parametrize("sampler", ORDERS)
@pytest.mark.parametrize(("schedule", "spacing"), [("linear", "uniform"), ("linear", "log_snr"), ("cosine", "uniform")])
def test_many_steps_of_a_real_schedule_reach_the_data(sampler, schedule, spacing):
    levels = build_schedule(schedule).levels(200, spacing=spacing)
    got = final(sampler, gaussian(), start_noise(), levels)
    # What the first-order step to clean leaves behind at the last noisy level, and DDIM's own error of 1 / 200.
    assert (got - exact(start_noise(), levels[0], CLEAN)).abs().max() < (0.03 if sampler == "ddim" else 0.01)


def test_two_clusters_are_told_apart_by_every_solver_alike():
    centres = torch.tensor([-1.0, 1.0], dtype=torch.float64)

    def denoise(x, level):
        variance = level.alpha**2 * 0.1**2 + level.sigma**2
        offsets = x[..., None] - level.alpha * centres
        share = torch.softmax(-(offsets**2) / (2 * variance), dim=-1)
        x0 = (share * (centres + level.alpha * 0.1**2 / variance * offsets)).sum(-1)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    levels = build_schedule("flow").levels(1024)
    reference = final("heun", denoise, start_noise(), levels)
    assert {-1.0, 1.0} == set(reference.round().flatten().tolist())
    errors = {
        sampler: (final(sampler, denoise, start_noise(), levels[::8]) - reference).square().mean().sqrt()
        for sampler in ORDERS
    }
    assert max(errors["heun"], errors["dpm-solver++"]) < errors["ddim"] < 0.05


def test_ddim_without_noise_is_euler_on_flow_levels():
    levels = build_schedule("flow").levels(7)
    x = start_noise()
    steps = ddim(gaussian(), start_noise(), levels, randn_like=no_noise)
    for i, got in enumerate(steps):
        estimate = gaussian()(x, levels[i])
        x = x - (estimate.eps - estimate.x0) / 7
        torch.testing.assert_close(got, x, rtol=0, atol=1e-14)


def test_heun_with_one_step_and_dpm_solver_with_one_step_are_ddim():
    for schedule in ("linear", "cosine", "flow"):
        levels = build_schedule(schedule).levels(1, spacing="uniform")
        results = [final(name, gaussian(), start_noise(), levels) for name in ORDERS]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=1e-12)


def test_ddim_run_backwards_encodes_what_it_then_decodes():
    errors = []
    for steps in (100, 200):
        chain = path("linear", steps)
        encoded = final("ddim", gaussian(), start_noise(), chain[::-1])
        decoded = final("ddim", gaussian(), encoded, chain)
        errors.append((decoded - start_noise()).abs().max().item())
    assert 0.75 < math.log2(errors[0] / errors[1]) < 1.25, errors


def test_evaluations_per_run_are_those_of_the_table():
    for name, sampler in SAMPLERS.items():
        calls = []

        def counting(x, level, calls=calls):
            calls.append(level)
            return gaussian()(x, level)

        list(sampler.run(counting, start_noise(), build_schedule("flow").levels(9), randn_like=torch.randn_like))
        assert len(calls) == sampler.evaluations(9), name
        assert all(level.sigma > 0 for level in calls)


def many(rows=200_000):
    return torch.randn(rows, 1, 1, 1, generator=torch.Generator().manual_seed(1))


def seeded():
    generator = torch.Generator().manual_seed(2)
    return lambda x: torch.randn(x.shape, generator=generator)


FIVE_SIGMA = 5 * math.sqrt(2 / 200_000)  # of an estimated variance, relative


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_with_large_variance_is_exact_for_unit_variance_data(schedule):
    levels = build_schedule(schedule).levels(10, spacing="uniform")
    *_, got = ddpm(gaussian(std=1.0, mean=0.0), many(), levels, fixed_variance="large", randn_like=seeded())
    # The last step returns the estimate, which at the last level is alpha times the latents.
    assert got.var().item() == pytest.approx(levels[-2].alpha ** 2, rel=FIVE_SIGMA)


def test_ddpm_with_small_variance_is_exact_for_a_single_point():
    for schedule in ("linear", "flow"):
        levels = build_schedule(schedule).levels(10)
        *_, got = ddpm(gaussian(std=0.0), many(1000), levels, fixed_variance="small", randn_like=seeded())
        torch.testing.assert_close(got, torch.full_like(got, MEAN))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_ddpm_with_the_right_learned_variance_is_exact_for_normal_data(schedule):
    levels = build_schedule(schedule).levels(12, spacing="uniform")
    cleaner = dict(pairwise(levels))

    def mix(x, now):
        after = cleaner[now]
        if after.sigma == 0:
            return torch.zeros_like(x)
        _, x0_weight, small = posterior(now, after)
        large = step_variance(now.alpha, now.sigma, after.alpha, after.sigma)
        x0_variance = STD**2 * now.sigma**2 / spread(now) ** 2
        wanted = small + x0_weight**2 * x0_variance
        return torch.full_like(x, (math.log(wanted) - math.log(small)) / (math.log(large) - math.log(small)))

    # The chain starts in the distribution of its first level, so that each later one has to be met.
    first = levels[0].alpha * MEAN + spread(levels[0]) * many()
    *seen, got = ddpm(gaussian(mix=mix), first, levels, randn_like=seeded())
    for latents, level in zip(seen, levels[1:], strict=False):
        assert latents.var().item() == pytest.approx(spread(level) ** 2, rel=FIVE_SIGMA)
        assert latents.mean().item() == pytest.approx(level.alpha * MEAN, abs=5 * spread(level) / math.sqrt(200_000))
    last = levels[-2]
    assert got.var().item() == pytest.approx((last.alpha * STD**2 / spread(last)) ** 2, rel=FIVE_SIGMA)


def test_ddim_with_eta_1_has_the_noise_of_ddpm_with_small_variance():
    levels = build_schedule("linear").levels(20)
    one = list(ddim(gaussian(), start_noise(), levels, eta=1.0, randn_like=torch.ones_like))
    other = list(ddpm(gaussian(), start_noise(), levels, fixed_variance="small", randn_like=torch.ones_like))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_stays_near_float64(sampler, schedule):
    levels = build_schedule(schedule).levels(25, spacing="uniform")
    config = SamplingConfig(sampler=sampler)
    exactly, rounded = (
        list(run_sampler(config, gaussian(), start_noise().to(dtype), levels, randn_like=torch.zeros_like))[-1]
        for dtype in (torch.float64, torch.float32)
    )
    # 25 steps, each with a handful of roundings of numbers of size 3 or less.
    assert (exactly - rounded.double()).abs().max() < 25 * 6 * 3 * torch.finfo(torch.float32).eps


def test_a_sampler_yields_once_per_step_and_keeps_its_input():
    for sampler in (ddpm, ddim, heun, dpm_solver):
        x = start_noise()
        before = x.clone()
        yielded = list(sampler(gaussian(), x, build_schedule("linear").levels(6)))
        assert len(yielded) == 6
        assert torch.equal(x, before)
        assert len({y.data_ptr() for y in yielded}) == 6
