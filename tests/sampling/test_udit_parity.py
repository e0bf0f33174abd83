"""The released U-DiT's DDIM loop through our network and sampler."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.checkpoints.official import from_official
from smalti.diffusion import build_schedule, guided_denoiser
from smalti.sampling.ddim import ddim

DATA = Path(__file__).parents[1] / "data" / "parity"


@pytest.mark.parametrize("form", ["as trained", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ddim_loop_of_the_released_udit(form, dtype):
    entry = json.loads((DATA / "index_udit.json").read_text())["files"]["e2e_udit_ddim.safetensors"]
    tensors = load_file(DATA / "e2e_udit_ddim.safetensors")
    state = {k.removeprefix("state."): v.to(dtype) for k, v in tensors.items() if k.startswith("state.")}
    model = from_official("YuchuanTian/U-DiT", state, **entry["hyperparams"])
    denoise = guided_denoiser(
        model.fuse() if form == "fused" else model,
        tensors["input.y"],
        learned_variance=True,
        null_class=entry["hyperparams"]["num_classes"],
        guidance_scale=1.0,
    )
    assert entry["sampler"]["timestep_respacing"] == "ddim5"
    assert entry["sampler"]["eta"] == 0
    levels = build_schedule("linear").levels(5, spacing="ddim")
    *_, got = ddim(denoise, tensors["input.z"].to(dtype), levels, eta=0.0)
    expected = tensors["output.samples"]
    assert (got - expected).abs().max() / expected.abs().max() <= entry["suggested_tolerance"]["float32"]
