"""The Triton twin of Bi-WKV without a GPU: its numbers under Triton's interpreter, its compilation, its refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from smalti.ops.bi_wkv import triton as twin

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not twin.INSTALLED, reason="needs triton, which is made for Linux only")
RESULTS = ("output", "decay", "bonus", "key", "value")


def run(program, *arguments, timeout=280, **environment):
    done = subprocess.run(
        [sys.executable, HERE / program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])} | environment,
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr, done.stderr  # NaN and overflow inside a kernel
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.long
def test_interpreted_kernels_are_as_exact_as_the_reference_repeat_and_pass_the_compiler():
    # One test, because the program behind it is slow and every worker of a test run would start it once more.
    found = run("interpret_bi_wkv.py")
    assert len(found["errors"]) > 35
    worse, ordinary = {}, {}
    for case, tokens, exponent, dtype, results in found["errors"]:
        assert tuple(results) == RESULTS
        # The tolerance of tests/contract/test_ops.py, but each gradient against its own largest value; and the kernels
        # keep the log of the denominator in float32, where it is rounded like any number as large as the exponents.
        rounding = 4 * torch.finfo(getattr(torch, dtype)).eps + (2 * tokens + exponent) * torch.finfo(torch.float32).eps
        worse |= {(case, dtype, r): e for r, e in results.items() if not e[0] <= 2 * e[1] + rounding}
        if "channels" in case and dtype == "float32":
            ordinary |= {(case, r): error for r, (error, _) in results.items()}
    assert worse == {}
    # Sums are joined pairwise: errors are a few dozen roundings of 6e-8, for any number of tokens.
    assert len(ordinary) > 50
    assert {case: error for case, error in ordinary.items() if not error <= (2e-6 if "output" in case else 1e-5)} == {}

    facts = found["facts"]
    assert facts["repeats"]
    assert facts["strided"]
    assert facts["compiles"]
    assert facts["without gradients"]
    assert facts["saved without gradients"] == 0
    assert len(facts["checks"]) == 4
    assert set(facts["checks"].values()) == {"SUCCESS"}


@needs_triton
@pytest.mark.long
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    sizes = run("compile_triton_bi_wkv.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert set(sizes) == {f"{way}, {chunks} chunks" for way in ("forward", "backward") for chunks in (1, 2)}
    assert all(size > 1000 for size in sizes.values())


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 256, 257, 1000, 1024, 1025, 16384])
def test_tiles_are_powers_of_two_that_hold_every_token(tokens):
    settings = twin.launch_settings(tokens)
    rows, columns, chunks, warps = (settings[name] for name in ("N", "C", "CHUNKS", "num_warps"))
    for size in (rows, columns, warps):
        assert size & (size - 1) == 0
    assert (chunks - 1) * rows < tokens <= chunks * rows
    assert (chunks == 1) == (tokens <= 1024)
    assert rows * columns <= twin.TILE
    assert warps <= 16


def example(device="cuda", dtype=torch.float32, shape=(2, 3, 4)):
    return [torch.empty(shape[-1:], device=device, dtype=dtype) for _ in range(2)] + [
        torch.empty(shape, device=device, dtype=dtype) for _ in range(2)
    ]


def test_what_the_kernels_cannot_take_is_refused_with_its_reason(monkeypatch):
    refusal = twin.triton_refusal
    assert refusal(tuple(example("cpu"))) == "it is for CUDA, got cpu"
    assert "got meta" in refusal(tuple(example("meta")))
    with FakeTensorMode():  # CUDA tensors without CUDA
        assert "got torch.float64" in refusal(tuple(example(dtype=torch.float64)))
        assert "got cpu" in refusal((*example()[:3], example("cpu")[3]))
        assert "one dtype" in refusal((*example()[:3], example(dtype=torch.bfloat16)[3]))
        assert "nothing to do" in refusal(tuple(example(shape=(0, 3, 4))))
        monkeypatch.setattr(twin, "INSTALLED", False)
        assert "pip install triton" in refusal(tuple(example()))
        monkeypatch.setattr(twin, "INSTALLED", True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert refusal(tuple(example(dtype=dtype))) == ""


def test_importing_the_twin_does_not_import_triton():
    program = "import sys, smalti.ops.bi_wkv.triton; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.stdout == "False\n", done.stderr
