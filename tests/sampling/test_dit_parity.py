"""The released DiT loops, sampling and training, through our network, objective and sampler."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from smalti.checkpoints.official import from_official
from smalti.diffusion import ObjectiveConfig, build_schedule, guided_denoiser, training_losses
from smalti.diffusion.levels import level_batch
from smalti.sampling.ddpm import ddpm

DATA = Path(__file__).parents[1] / "data" / "parity"
INDEX = json.loads((DATA / "index_diffusion.json").read_text())["files"]


def load(file):
    tensors = load_file(DATA / file)
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return tensors, INDEX[file], from_official("facebookresearch/DiT", state, **INDEX[file]["hyperparams"])


def test_guided_ddpm_loop_of_the_released_dit():
    tensors, entry, model = load("e2e_dit_ddpm_cfg.safetensors")
    sampler, rows = entry["sampler"], len(tensors["input.z"])
    denoise = guided_denoiser(
        model.eval(),
        tensors["input.y"][:rows],
        learned_variance=True,
        null_class=entry["hyperparams"]["num_classes"],
        guidance_scale=sampler["cfg_scale"],
        guidance_channels=3,
    )
    noises = iter(tensors["input.step_noises"][:, :rows])
    levels = build_schedule("linear").levels(int(sampler["timestep_respacing"]))
    *_, got = ddpm(denoise, tensors["input.z"], levels, randn_like=lambda x: next(noises))
    expected = tensors["output.samples"]
    assert (got - expected).abs().max() / expected.abs().max() <= entry["suggested_tolerance"]["float32"]


def test_four_training_steps_of_the_released_dit():
    tensors, entry, model = load("train_steps_dit.safetensors")
    recipe = entry["training"]
    model = model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe["lr"], betas=tuple(recipe["betas"]), eps=recipe["eps"], weight_decay=0.0
    )
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    levels = build_schedule("linear").levels(1000)
    losses = []
    for step in range(recipe["steps"]):
        got = training_losses(
            model,
            tensors["input.x0"][step],
            tensors["input.y"][step],
            eps=tensors["input.noise"][step],
            levels=level_batch(levels, tensors["input.t"][step]),
            config=ObjectiveConfig(),
            learned_variance=True,
        )
        losses.append(torch.stack([part.detach().mean() for part in got]))
        optimizer.zero_grad()
        got.loss.mean().backward()
        optimizer.step()
        for key, value in model.state_dict().items():
            ema[key].lerp_(value, 1 - recipe["ema_decay"])
    expected = tensors["output.losses"]
    assert (torch.stack(losses) - expected).abs().max() / expected.abs().max() <= 1e-5
    for prefix, state in (("final.", model.state_dict()), ("final_ema.", ema)):
        released = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        wanted = from_official("facebookresearch/DiT", released, **entry["hyperparams"]).state_dict()
        assert wanted.keys() == state.keys()
        differences = torch.cat([(state[k] - wanted[k]).abs().flatten() for k in wanted])
        # Adam's first update is the sign of the gradient, so a few entries with almost none may fall the other way.
        assert (differences > 0.05 * recipe["lr"]).double().mean() <= 1e-3
