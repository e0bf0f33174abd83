"""Downsampled attention against its equations written out once more, its rotary positions, and its refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from smalti.errors import ConfigError
from smalti.nn.layers import Grid
from smalti.nn.mixers import DownsampledAttention, DownsampledAttentionConfig
from smalti.nn.mixers.downsampled_attention import rope2d
from smalti.nn.plane import as_plane, as_tokens
from smalti.ops import rotary

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

DATA = Path(__file__).parents[1] / "data" / "parity"
WIDTH = 16


def build(**changes):
    mixer = DownsampledAttention(DownsampledAttentionConfig(**{"num_heads": 2} | changes), WIDTH)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer.double()


def by_the_paper(mixer, x, grid):
    """Phase after phase, head after head, and rotations as products of complex numbers (sec. 3.2 and 3.3)."""
    c, s = mixer.config, mixer.state_dict()
    f, width = c.factor, x.shape[-1] // c.num_heads
    plane = x.mT.reshape(len(x), -1, *grid)
    kernel = s["depthwise.weight"]
    convolved = F.conv2d(plane, kernel, s["depthwise.bias"], padding=kernel.shape[-1] // 2, groups=len(kernel))
    plane = convolved + plane if c.shortcut else convolved
    result = torch.empty_like(plane)
    for i in range(f):
        for j in range(f):
            phase = plane[:, :, i::f, j::f]
            rows, columns = phase.shape[2:]
            tokens = phase.flatten(2).mT
            q, k, v = (tokens @ s["qkv.weight"].T + s["qkv.bias"]).chunk(3, dim=-1)
            heads = []
            for h in range(c.num_heads):
                qh, kh, vh = (t[..., h * width : (h + 1) * width] for t in (q, k, v))
                if c.position == "rope2d":
                    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
                    exponents = torch.arange(width // 4).double() * 4 / width
                    angles = torch.stack([p.flatten()[:, None] * 10000**-exponents for p in (column, row)], dim=-1)
                    turn = torch.exp(1j * angles.flatten(1))
                    pairs = (torch.complex(t[..., 0::2], t[..., 1::2]) for t in (qh, kh))
                    qh, kh = (torch.view_as_real(pair * turn).flatten(-2) for pair in pairs)
                scale = width**-0.5
                if c.cosine:
                    qh, kh = (t / t.norm(dim=-1, keepdim=True) for t in (qh, kh))
                    scale = min(s["scale"][h].item(), math.log(100.0))
                    scale = math.exp(scale)
                heads.append(torch.softmax(scale * qh @ kh.mT, dim=-1) @ vh)
            result[:, :, i::f, j::f] = torch.cat(heads, dim=-1).mT.unflatten(-1, (rows, columns))
    return result.flatten(2).mT @ s["out.weight"][:, :, 0, 0].T + s["out.bias"]


@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(2, 12), Grid(12, 6)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shortcut": False},
        {"cosine": False},
        {"position": "none"},
        {"downsampler": "dwconv3", "cosine": False, "position": "none"},
        {"factor": 1},
        {"num_heads": 4},
    ],
    ids=str,
)
def test_the_mixer_computes_the_paper_s_equations(grid, changes):
    mixer, x = build(**changes), torch.randn(2, grid.tokens, WIDTH, dtype=torch.float64)
    # The rotary table is float32, 6e-8 off, and without cosines the products of queries and keys reach hundreds.
    torch.testing.assert_close(mixer(x, grid), by_the_paper(mixer, x, grid), rtol=1e-4, atol=1e-4)


def test_three_rows_and_columns_make_nine_phases():
    grid = Grid(6, 9)
    mixer, x = build(factor=3), torch.randn(1, grid.tokens, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, grid), by_the_paper(mixer, x, grid), rtol=1e-6, atol=1e-6)


def test_a_temperature_above_its_cap_acts_as_the_cap_and_hears_no_gradient():
    grid = Grid(4, 4)
    mixer, x = build(), torch.randn(2, grid.tokens, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        mixer.scale.copy_(torch.tensor([5.0, 1.0])[:, None, None])
    output = mixer(x, grid)
    output.sum().backward()
    assert mixer.scale.grad[0].item() == 0
    assert mixer.scale.grad[1].item() != 0
    with torch.no_grad():
        mixer.scale[0] = 50.0
    assert torch.equal(mixer(x, grid), output)


def test_attention_starts_with_a_temperature_of_ten():
    mixer = DownsampledAttention(DownsampledAttentionConfig(num_heads=2), WIDTH)
    torch.testing.assert_close(mixer.scale.exp(), torch.full((2, 1, 1), 10.0))


# --- rotary positions


@pytest.mark.parametrize(("case", "grid"), [("dim4_N16", (4, 4)), ("dim8_N24", (4, 6)), ("dim24_N64", (8, 8))])
def test_the_released_rotary_table_is_ours_to_the_last_bit_and_so_are_rotated_tokens(case, grid):
    tensors = load_file(DATA / "rope2d.safetensors")
    cos, sin = rope2d(Grid(*grid), 2 * tensors[f"output.{case}.cos"].shape[1], square=True)
    assert torch.equal(cos, tensors[f"output.{case}.cos"])
    assert torch.equal(sin, tensors[f"output.{case}.sin"])
    stated = json.loads((DATA / "index_udit.json").read_text())["files"]["rope2d.safetensors"]["suggested_tolerance"]
    for impl in ("auto", "reference", "complex"):
        for name in "qk":
            found = rotary(tensors[f"input.{name}.{case}"], cos, sin, impl=impl)
            assert (found - tensors[f"output.{name}.{case}"]).abs().max() <= stated["abs"]


def test_the_square_rule_is_the_layout_on_square_grids_only():
    for grid, same in ((Grid(4, 4), True), (Grid(2, 8), False), (Grid(8, 2), False), (Grid(4, 6), False)):
        tables = zip(rope2d(grid, 8), rope2d(grid, 8, square=True), strict=True)
        assert all(torch.equal(a, b) for a, b in tables) is same


def test_rotated_products_depend_on_the_way_between_two_tokens_only():
    grid = Grid(5, 7)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = (table.double() for table in rope2d(grid, 8))
    turned = [rotary(t.expand(1, grid.tokens, 1, 8).contiguous(), cos, sin)[0, :, 0] for t in (q, k)]
    products = (turned[0] @ turned[1].T).unflatten(0, grid).unflatten(-1, grid)
    torch.testing.assert_close(products[1:, 2:, 1:, 2:], products[:-1, :-2, :-1, :-2], rtol=1e-5, atol=1e-5)


def test_the_compiler_and_half_precision_get_real_arithmetic(monkeypatch):
    assert rotary.refuses("complex", rotary.example(4, torch.float32)) == ""
    assert "no complex numbers for torch.bfloat16" in rotary.refuses("complex", rotary.example(4, torch.bfloat16))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "compiler" in rotary.refuses("complex", rotary.example(4, torch.float32))


# --- memory and refusals


def test_tokens_become_a_plane_and_back_without_a_copy():
    x = torch.randn(2, 6, 4)
    plane = as_plane(x, Grid(2, 3))
    assert plane.shape == (2, 4, 2, 3)
    assert plane.is_contiguous(memory_format=torch.channels_last)
    assert plane.data_ptr() == x.data_ptr() == as_tokens(plane).data_ptr()
    assert torch.equal(as_tokens(plane), x)
    assert torch.equal(plane[0, :, 1, 2], x[0, 5])


def test_in_context_tokens_and_grids_that_do_not_split_are_refused_in_one_line(no_shape_checks):
    mixer = build()
    for tokens, grid, message in (
        (18, Grid(4, 4), "18 tokens for a grid of 4x4: .* takes no in-context tokens"),
        (12, Grid(3, 4), "a grid of 3x4 cannot be split into phases: both must be divisible by the factor 2"),
        (12, Grid(4, 3), "a grid of 4x3 cannot be split"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            mixer(torch.randn(1, tokens, WIDTH, dtype=torch.float64), grid)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "hidden_size 16 cannot be split into 3 heads: choose a divisor of it"),
        ({"num_heads": 0}, "hidden_size 16 cannot be split into 0 heads"),
        ({"num_heads": 8}, "heads of 2 channels (16 in 8): rotary positions in two directions need a multiple of 4"),
        ({"factor": 0}, "factor 0 of the downsampled attention must be at least 1"),
        ({"downsampler": "conv5"}, "unknown downsampler 'conv5'; did you mean 'dwconv5'?"),
        ({"position": "rope"}, "unknown position 'rope'; did you mean 'rope2d'?"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_channels_a_head_are_enough_without_positions():
    mixer = build(num_heads=8, position="none")
    assert mixer(torch.randn(1, 4, WIDTH, dtype=torch.float64), Grid(2, 2)).isfinite().all()
