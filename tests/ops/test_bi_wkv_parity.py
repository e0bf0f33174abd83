"""Frozen numbers of Bi-WKV: the published formula, and the released kernel. What each is: README_bi_wkv.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.ops import bi_wkv, bi_wkv_release

DATA = Path(__file__).parents[1] / "data" / "parity"
INDEX = json.loads((DATA / "index_bi_wkv.json").read_text())["files"]["wkv_op.safetensors"]
GOLDEN = load_file(DATA / "wkv_op.safetensors")
CASES = pytest.mark.parametrize("case", INDEX["cases"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def compare(run, case, dtype, output, grad):
    tolerance = INDEX["tolerance"][str(dtype).removeprefix("torch.")]
    inputs = [GOLDEN[f"{case}.input.{name}"].to(dtype).requires_grad_() for name in "wukv"]
    y = run(*inputs)
    gradients = torch.autograd.grad(y, inputs, GOLDEN[f"{case}.input.gy"].to(dtype))
    pairs = [(y, f"{output}.y", tolerance["output"])]
    pairs += [(g, f"{grad}.{name}", tolerance["grad"]) for name, g in zip("wukv", gradients, strict=True)]
    for got, name, limit in pairs:
        expected = GOLDEN[f"{case}.{name}"]
        assert got.dtype == dtype
        error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
        assert error <= limit, name


@CASES
@DTYPES
@pytest.mark.parametrize("impl", ["reference", "c", "prefix"])
def test_the_mean_equals_the_published_formula_and_its_gradients(case, dtype, impl):
    if reason := bi_wkv.refuses(impl, bi_wkv.example(2, dtype)):
        pytest.skip(reason)
    compare(lambda *args: bi_wkv(*args, impl=impl), case, dtype, "output_paper", "grad_paper")


@CASES
@DTYPES
def test_the_released_form_equals_the_released_kernel_and_its_true_gradients(case, dtype):
    compare(bi_wkv_release, case, dtype, "output", "grad_exact")


@CASES
def test_the_two_differ_by_what_the_index_says(case):
    inputs = [GOLDEN[f"{case}.input.{name}"].double() for name in "wukv"]
    released = bi_wkv_release(*inputs)
    difference = ((bi_wkv(*inputs, impl="reference") - released).abs().max() / released.abs().max()).item()
    assert difference == pytest.approx(INDEX["cases"][case]["paper_minus_official"], rel=0.01)


def test_the_released_form_in_few_channels_at_a_time_is_the_same(monkeypatch):
    from smalti.ops.bi_wkv import release

    inputs = bi_wkv_release.example(40, torch.float64)
    whole = bi_wkv_release(*inputs)
    monkeypatch.setattr(release, "_TABLE", 5 * 2 * 40 * 40)
    torch.testing.assert_close(bi_wkv_release(*inputs), whole, rtol=1e-14, atol=1e-14)
