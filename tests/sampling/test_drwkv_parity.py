"""The released Diffusion-RWKV loop, clipped and guided, through our network and sampler."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.checkpoints.official import from_official
from smalti.diffusion import build_schedule, guided_denoiser
from smalti.sampling.ddpm import ddpm

DATA = Path(__file__).parents[1] / "data" / "parity"
FILE = "e2e_drwkv_ddpm_cfg_clip.safetensors"
ENTRY = json.loads((DATA / "index_drwkv.json").read_text())["files"][FILE]


def error_of_loop(dtype, clip_x0):
    tensors, sampler = load_file(DATA / FILE), ENTRY["sampler"]
    state = {k.removeprefix("state."): v.to(dtype) for k, v in tensors.items() if k.startswith("state.")}
    rows = len(tensors["input.z"])
    denoise = guided_denoiser(
        from_official("feizc/Diffusion-RWKV", state, **ENTRY["hyperparams"]),
        tensors["input.y"][:rows],
        learned_variance=True,
        null_class=ENTRY["hyperparams"]["num_classes"],
        guidance_scale=sampler["cfg_scale"],
        guidance_channels=3,
        clip_x0=clip_x0,
    )
    noises = iter(tensors["input.step_noises"][:, :rows].to(dtype))
    levels = build_schedule("linear").levels(int(sampler["timestep_respacing"]))
    *_, got = ddpm(denoise, tensors["input.z"].to(dtype), levels, randn_like=lambda x: next(noises))
    expected = tensors["output.samples"]
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_guided_clipped_ddpm_loop_of_the_released_diffusion_rwkv(dtype):
    assert error_of_loop(dtype, ENTRY["sampler"]["clip_denoised"]) <= ENTRY["suggested_tolerance"]["float32"]


def test_without_clipping_the_loop_goes_elsewhere():
    assert error_of_loop(torch.float32, False) > 1e-2
