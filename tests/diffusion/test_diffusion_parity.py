"""Frozen numbers of the released diffusion code. What was run, and how closely to meet it: index_diffusion.json."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.diffusion import Level, ObjectiveConfig, add_noise, bits_per_dim, build_schedule, to_denoised
from smalti.diffusion.labels import drop_labels, drop_mask
from smalti.diffusion.levels import CLEAN, level_batch, posterior, step_variance
from smalti.diffusion.objectives import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    losses_from_output,
    model_log_variance,
    normal_kl,
    prior_bits,
    variational_bound,
)
from smalti.diffusion.prediction import x0_weights
from smalti.diffusion.timesteps import LossSecondMoment
from smalti.sampling.ddim import ddim
from smalti.sampling.ddpm import ddpm

DATA = Path(__file__).parents[1] / "data" / "parity"
INDEX = json.loads((DATA / "index_diffusion.json").read_text())["files"]
SCHEDULE = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTION = {"EPSILON": "eps", "START_X": "x0"}
VARIANCE = {"LEARNED_RANGE": "learned", "FIXED_LARGE": "large", "FIXED_SMALL": "small"}
TABLES, STEPS, LOOPS = (f"diffusion_{kind}.safetensors" for kind in ("tables", "steps", "loops"))


def cases(file):
    return [pytest.param(name, case, id=name) for name, case in INDEX[file]["cases"].items()]


def tensors(file, prefix=""):
    return {k[len(prefix) :]: v for k, v in load_file(DATA / file).items() if k.startswith(prefix)}


def chain(case):
    """The levels of a released `timestep_respacing` string."""
    respacing, total = case["timestep_respacing"], case["diffusion_steps"]
    schedule = build_schedule(SCHEDULE[case["noise_schedule"]], total)
    if respacing.startswith("ddim"):
        return schedule.levels(int(respacing[4:]), spacing="ddim")
    if "," in respacing:
        return schedule.levels(sum(map(int, respacing.split(","))), spacing=respacing)
    return schedule.levels(int(respacing or total), spacing="respaced")


def assert_close(got, expected, tolerance, what):
    """The index's error measure: largest difference over largest magnitude."""
    got, expected = torch.as_tensor(got).double(), expected.double()
    assert got.shape == expected.shape, what
    error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.1e}"


@pytest.mark.parametrize(("name", "case"), cases(TABLES))
def test_levels_hold_every_released_table(name, case):
    levels = chain(case)
    steps = list(pairwise(levels))[::-1]  # the released tables begin at the clean end
    levels = [now for now, _ in steps]
    batch = level_batch([*reversed(levels), CLEAN], torch.arange(len(levels)))
    alpha_bar = [level.alpha**2 for level in levels]
    noisier_alpha_bar = [*alpha_bar[1:], 0.0]
    got = {
        "betas": [step_variance(n.alpha, n.sigma, c.alpha, c.sigma) for n, c in steps],
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": [cleaner.alpha**2 for _, cleaner in steps],
        "alphas_cumprod_next": noisier_alpha_bar,
        "sqrt_alphas_cumprod": [level.alpha for level in levels],
        "sqrt_one_minus_alphas_cumprod": [level.sigma for level in levels],
        "log_one_minus_alphas_cumprod": [2 * math.log(level.sigma) for level in levels],
        "sqrt_recip_alphas_cumprod": [1 / level.alpha for level in levels],
        "sqrt_recipm1_alphas_cumprod": [level.sigma / level.alpha for level in levels],
        "posterior_variance": [posterior(*step).variance for step in steps],
        "posterior_log_variance_clipped": batch.min_log_variance,
        "posterior_mean_coef1": [posterior(*step).x0_weight for step in steps],
        "posterior_mean_coef2": [posterior(*step).x_t_weight for step in steps],
    }
    expected = tensors(TABLES, f"{name}.")
    assert [level.timestep for level in levels] == expected.pop("timestep_map").tolist()
    assert expected
    for table, values in expected.items():
        values_got = torch.as_tensor(got[table], dtype=torch.float64)
        assert_close(values_got, values, INDEX[TABLES]["suggested_tolerance"]["rel"], table)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "case"), cases(STEPS))
def test_losses_bounds_and_single_steps(name, case, dtype):
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors(STEPS, f"{name}.input.").items()}
    expected = {k: v for k, v in tensors(STEPS, f"{name}.output.").items() if "cond_fn" not in k}
    got = released_step(case, chain(case), **given)
    assert set(got) == set(expected)
    for key, value in expected.items():
        if dtype == torch.float32:
            tolerance = 10 * INDEX[STEPS]["f32_vs_f64"][name]["max_rel_to_max"]
        else:
            tolerance = 1e-9 if key.startswith(("loss_", "vb_", "prior_")) else 1e-6
        assert_close(got[key], value, tolerance, key)


def released_step(case, levels, *, x0, t, noise, step_noise, model_output):
    prediction, variance = PREDICTION[case["model_mean_type"]], VARIANCE[case["model_var_type"]]
    learned, channels = variance == "learned", x0.shape[1]
    here = level_batch(levels, t)
    places = [len(levels) - 2 - index for index in t.tolist()]
    x_t = add_noise(x0, noise, here)
    mix = (model_output[:, channels:] + 1) / 2 if learned else None

    def each(run):
        """Run on every sample by itself, at its own level."""
        return torch.cat([run(slice(i, i + 1), place) for i, place in enumerate(places)])

    def denoise_at(rows, clip=case["clip_denoised"]):
        return lambda x, level: to_denoised(
            model_output[rows], x, level, prediction, learned_variance=learned, clip_x0=clip
        )

    def one_step(sampler, after=lambda place: levels[place + 1], **options):
        return each(
            lambda rows, place: next(
                sampler(
                    denoise_at(rows),
                    x_t[rows],
                    [levels[place], after(place)],
                    randn_like=lambda x: step_noise[rows],
                    **options,
                )
            )
        )

    def noisier(place):
        return levels[place - 1] if place else Level(timestep=math.nan, alpha=0.0, sigma=1.0)

    def posterior_mean(estimate):
        def run(rows, place):
            weights = posterior(levels[place], levels[place + 1])
            return weights.x0_weight * estimate[rows] + weights.x_t_weight * x_t[rows]

        return each(run)

    clipped = each(lambda rows, place: denoise_at(rows)(x_t[rows], levels[place]).x0)
    column = (-1, 1, 1, 1)
    spread = torch.ones_like(x0)
    log_variance = model_log_variance(here, x0, mix=mix, variance=variance).expand_as(x0)
    true_variance = torch.tensor([posterior(levels[p], levels[p + 1]).variance for p in places], dtype=torch.float64)
    got = {
        "x_t": x_t,
        "q_mean": here.alpha.to(x0).view(column) * x0,
        "q_variance": (here.sigma**2).to(x0).view(column) * spread,
        "q_log_variance": (2 * here.sigma.log()).to(x0).view(column) * spread,
        "posterior_mean": posterior_mean(x0),
        "posterior_variance": true_variance.to(x0).view(column) * spread,
        "posterior_log_variance": here.min_log_variance.to(x0).view(column) * spread,
        "p_mean": posterior_mean(clipped),
        # Released "small" tables hold 0 at the cleanest level, and only their logarithm is floored.
        "p_variance": true_variance.to(x0).view(column) * spread if variance == "small" else log_variance.exp(),
        "p_log_variance": log_variance,
        "p_pred_xstart": clipped,
        "prior_bpd": prior_bits(x0, levels[0]),
        "ddpm_step": one_step(ddpm, **({} if learned else {"fixed_variance": variance})),
        "ddim_step_eta0": one_step(ddim),
        "ddim_step_eta1": one_step(ddim, eta=1.0),
        "ddim_step_eta0.5": one_step(ddim, eta=0.5),
        "ddim_reverse_step": one_step(ddim, after=noisier),
    }
    for key, clip in (("clip", True), ("noclip", False)):
        estimate = each(lambda rows, place, clip=clip: denoise_at(rows, clip)(x_t[rows], levels[place]).x0)
        got[f"vb_term_bpd_{key}"] = variational_bound(x0, estimate - x0, here, mix=mix, variance=variance)
    return got | released_losses(case, levels, here, prediction, x0, noise, model_output)


def released_losses(case, levels, here, prediction, x0, noise, model_output):
    output, steps = model_output.clone().requires_grad_(), len(levels) - 1
    learned, channels = case["model_var_type"] == "LEARNED_RANGE", x0.shape[1]
    got = {}
    if case["loss_type"].endswith("KL"):
        _, weight = x0_weights(prediction, here.alpha, here.sigma)
        error = weight.to(x0).view(-1, 1, 1, 1) * (output[:, :channels] - noise)
        loss = variational_bound(x0, error, here, mix=(output[:, channels:] + 1) / 2)
        loss = loss * (steps if case["loss_type"] == "RESCALED_KL" else 1)
    else:
        # The released losses state the bound as it enters the sum, so the rescaled one is stated scaled.
        weight = steps / 1000 if case["loss_type"] == "RESCALED_MSE" else 1.0
        config = ObjectiveConfig(prediction=prediction, variational_weight=weight)
        loss, got["loss_mse"], bound = losses_from_output(
            output, x0, eps=noise, levels=here, config=config, learned_variance=learned
        )
        if learned:
            got["loss_vb"] = weight * bound
    loss.mean().backward()
    return {k: v.detach() for k, v in got.items()} | {
        "loss_loss": loss.detach(),
        "grad_model_output_of_mean_loss": output.grad,
    }


def toy(x, timestep):
    """The network of the loop vectors; its formula stands in the index."""
    mean = 0.7 * x + 0.2 * math.sin(timestep / 37)
    return torch.cat([mean, torch.tanh(0.5 * x - 0.3 * math.cos(timestep / 53))], dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "case"), cases(LOOPS))
def test_whole_loops_with_given_noise(name, case, dtype):
    given = {k: v.to(dtype) for k, v in tensors(LOOPS, f"{name}.input.").items()}
    levels, variance = chain(case), VARIANCE[case["model_var_type"]]
    learned, channels = variance == "learned", given["x_T"].shape[1]

    def denoise(x, level, clip=case["clip_denoised"]):
        output = toy(x, level.timestep)[:, : channels * (1 + learned)]
        return to_denoised(output, x, level, "eps", learned_variance=learned, clip_x0=clip)

    def run(sampler, **options):
        noises = iter(given["step_noises"])
        return list(sampler(denoise, given["x_T"], levels, randn_like=lambda x: next(noises), **options))[-1]

    bound_noises = iter(given["bpd_noises"])
    bound = bits_per_dim(
        lambda x, level: denoise(x, level, clip=True),
        given["x0"],
        levels,
        variance=variance,
        randn_like=lambda x: next(bound_noises),
    )
    got = {
        "ddpm_loop": run(ddpm, **({} if learned else {"fixed_variance": variance})),
        "ddim_loop_eta0": run(ddim),
        "ddim_loop_eta1": run(ddim, eta=1.0),
        "bpd_total_bpd": bound.total,
        "bpd_prior_bpd": bound.prior,
        "bpd_vb": bound.vb,
        "bpd_xstart_mse": bound.x0_mse,
        "bpd_mse": bound.eps_mse,
    }
    expected = tensors(LOOPS, f"{name}.output.")
    assert set(got) == set(expected)
    for key, value in expected.items():
        if dtype == torch.float32:
            tolerance = 10 * INDEX[LOOPS]["f32_vs_f64"][name]["max_rel_to_max"]
        else:
            tolerance = 1e-9 if key.startswith("bpd_") else 1e-6
        assert_close(got[key], value, tolerance, key)


def test_likelihoods():
    t = tensors("likelihoods.safetensors")
    x, means, log_scales = (t[f"input.{k}"].double() for k in ("x", "means", "log_scales"))
    got = {
        "discretized": discretized_gaussian_log_likelihood(x, means, log_scales),
        "normal_kl": normal_kl(x, log_scales, means, 0.5 * log_scales),
        "normal_kl_vs_standard": normal_kl(x, log_scales, 0.0, 0.0),
        "cdf": approx_standard_normal_cdf(t["input.cdf_z"]),
    }
    for key, value in got.items():
        assert_close(value, t[f"output.{key}"], 1e-9, key)


def test_loss_second_moment_sampler():
    t = tensors("loss_second_moment_sampler.safetensors")
    sampler = LossSecondMoment(**INDEX["loss_second_moment_sampler.safetensors"]["hyperparams"])
    before = t["output.weights_before"]  # the released weights are not normalised
    assert_close(sampler.probabilities(), before / before.sum(), 1e-15, "before")
    sampler.update(t["input.ts"], t["input.losses"])
    assert_close(sampler.probabilities(), t["output.weights"], 1e-9, "weights")


def test_label_dropout():
    t = tensors("label_dropout.safetensors")
    settings = INDEX["label_dropout.safetensors"]["hyperparams"]
    table, null = t["state.embedding_table.weight"], settings["num_classes"]
    dropped = drop_labels(t["input.y"], drop_mask(t["record.uniforms_drawn"], settings["dropout_prob"]), null)
    assert torch.equal(dropped, t["record.dropped_labels"])
    assert torch.equal(table[dropped], t["output.train_seeded"])
    forced = drop_labels(t["input.y"], t["input.force_drop_ids"] == 1, null)
    assert torch.equal(table[forced], t["output.force_drop_train"])
    assert torch.equal(table[drop_labels(t["input.y"], torch.zeros(64, dtype=torch.bool), null)], t["output.eval"])
