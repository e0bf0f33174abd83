"""Frozen numbers of the released embeddings. What each file is, and how closely to meet it: index_parts.json."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.nn.embeddings import PatchEmbed, patchify, sincos_2d, timestep_sinusoid
from smalti.nn.layers import Grid, unpatchify

DATA = Path(__file__).parents[1] / "data" / "parity"
INDEX = json.loads((DATA / "index_parts.json").read_text())["files"]


def tensors(name):
    return load_file(DATA / f"{name}.safetensors"), INDEX[f"{name}.safetensors"]["tolerance"]


@pytest.mark.parametrize("size", INDEX["timestep_embedding.safetensors"]["hyperparams"]["dims"])
def test_timestep_sinusoids_equal_the_released_ones(size):
    golden, tolerance = tensors("timestep_embedding")
    got = timestep_sinusoid(golden["input.t"], size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, golden[f"output.dim{size}"], rtol=0, atol=tolerance["max_abs"])


def test_timestep_sinusoids_are_float32_whatever_comes_in():
    golden, _ = tensors("timestep_embedding")
    expected = timestep_sinusoid(golden["input.t"], 256)
    for dtype in (torch.float64, torch.int64):
        timesteps = golden["input.t"].floor().to(dtype)
        assert torch.equal(timestep_sinusoid(timesteps, 256), timestep_sinusoid(timesteps.float(), 256))
    # Not the exact values: near t = 1000 the float32 argument is off by 3e-5, as it was in training.
    assert (expected - golden["output_exact64.dim256"]).abs().max() > 1e-5


@pytest.mark.parametrize("name", [n for n in INDEX["pos_embed.safetensors"]["tensors"] if "extra" not in n])
def test_position_tables_equal_the_released_ones(name):
    golden, _ = tensors("pos_embed")
    width, side = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
    got = sincos_2d(side, side, width)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, golden[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_tokens_are_laid_on_the_plane_as_the_released_code_lays_them(case):
    golden, tolerance = tensors("patchify")
    assert tolerance["cases"] == 0
    tokens, image, patch_size = (golden[f"{case}.{n}"] for n in ("input.tokens", "output.image", "patch_size"))
    p = int(patch_size)
    grid = Grid(image.shape[2] // p, image.shape[3] // p)
    assert torch.equal(unpatchify(tokens, grid, p), image)
    # The released inverse orders a token (row, column, channel); ours, made for the embedding, (channel, row, column).
    back = patchify(image, p).unflatten(-1, (-1, p, p)).movedim(2, -1).flatten(2)
    assert torch.equal(back, tokens)


def test_the_patch_embedding_equals_the_released_convolution():
    golden, tolerance = tensors("patchify")
    weight, bias = golden["patch_embed.state.proj.weight"], golden["patch_embed.state.proj.bias"]
    embed = PatchEmbed(weight.shape[1], weight.shape[0], weight.shape[2])
    embed.load_state_dict({"proj.weight": weight, "proj.bias": bias})
    expected = golden["patch_embed.output.tokens"]
    with torch.no_grad():
        error = (embed(golden["patch_embed.input.x"]) - expected).abs().max() / expected.abs().max()
    assert error <= next(v for k, v in tolerance.items() if k.startswith("patch_embed"))
