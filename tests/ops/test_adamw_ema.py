"""AdamW and average in one pass: the definition is PyTorch's, the twins are as exact, and the C twin has its bits."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalti.ops import adamw_ema as package
from smalti.ops.adamw_ema import Operands, Rates, adamw_ema, adamw_ema_reference, c, refuses
from smalti.ops.adamw_ema import triton as gpu

HERE = Path(__file__).parent
EPS = torch.finfo(torch.float32).eps
SHAPES = ((1,), (7,), (8,), (9,), (0,), (4, 4), (33,), (3, 5, 7), (70_003,), (0,))
needs_triton = pytest.mark.skipif(not gpu.INSTALLED, reason="needs triton, which is made for Linux only")
needs_c = pytest.mark.skipif(bool(c.unavailable()), reason=c.unavailable())
# The order of roundings is PyTorch's own affair: asked for where it is known.
same_order = pytest.mark.skipif(
    not (torch.__version__.startswith("2.13.") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")),
    reason="bits are those of torch 2.13 on processors with AVX2",
)


def rates_of(**changes):
    usual = {"learning_rate": 1e-2, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 1e-2, "average": 0.1}
    return Rates(**usual | changes)


def numbers(shapes, seed=0, dtype=torch.float32):
    """Of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(2, *shape, generator=generator, dtype=dtype) for shape in shapes]
    return [x * (2 * y).exp() for x, y in normal]


def operands_of(shapes=SHAPES, *, steps=0, dtype=torch.float32):
    columns = [numbers(shapes, seed, dtype) for seed in range(5)]
    columns[3] = [x.square() for x in columns[3]]
    return Operands(*columns, [torch.tensor(float(steps)) for _ in shapes])


def copied(operands):
    return Operands(*([x.clone() for x in row] for row in operands))


def torch_steps(operands, rates, gradients):
    """PyTorch's optimizer and lerp from the same state, one step for each list of gradients, in place."""
    weights = [torch.nn.Parameter(x) for x in operands.weights]
    optimizer = torch.optim.AdamW(
        weights,
        lr=rates.learning_rate,
        betas=rates.betas,
        eps=rates.epsilon,
        weight_decay=rates.weight_decay,
        fused=True,
    )
    for weight, moment, square, step in zip(weights, operands.moments, operands.squares, operands.steps, strict=True):
        optimizer.state[weight] = {"step": step, "exp_avg": moment, "exp_avg_sq": square}
    for given in gradients:
        for weight, gradient in zip(weights, given, strict=True):
            weight.grad = gradient
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(operands.averages, weights, rates.average)


CHANGES = [
    {},
    {"weight_decay": 0.0, "average": 1e-4},
    {"average": 0.9},
    {"average": 1.0},
    {"average": 0.5},
    {"betas": (0.4, 0.9), "weight_decay": 0.3},
    {"betas": (0.0, 0.99)},
]
EACH_RATES = pytest.mark.parametrize("changes", CHANGES, ids=str)


@EACH_RATES
def test_the_definition_is_the_step_of_torch_in_float64(changes):
    rates = rates_of(**changes)
    operands = operands_of(dtype=torch.float64)
    ours = [row[:5] for row in zip(*copied(operands), strict=True)]
    gradients = [numbers(SHAPES, 10 + k, torch.float64) for k in range(3)]
    torch_steps(operands, rates, gradients)
    for k, given in enumerate(gradients):
        for n, (weight, _, *others) in enumerate(ours):
            weight, *others = adamw_ema_reference(weight, given[n], *others, k + 1, rates)
            ours[n] = (weight, given[n], *others)
    for n, (weight, _, moment, square, average) in enumerate(ours):
        for own, expected in zip(
            (weight, moment, square, average), [operands[k][n] for k in (0, 2, 3, 4)], strict=True
        ):
            # A few roundings in each of three steps; differences of large numbers may be small.
            torch.testing.assert_close(own, expected, rtol=1e-13, atol=1e-12)


@needs_c
@EACH_RATES
def test_c_is_as_exact_as_the_definition_in_float32(changes):
    rates = rates_of(**changes)
    operands = operands_of(steps=4)
    before = copied(operands)
    assert refuses(operands) == ""
    adamw_ema(operands, rates)
    for n, row in enumerate(zip(*before[:5], strict=True)):
        exact = adamw_ema_reference(*(x.double() for x in row), 5, rates)
        plain = adamw_ema_reference(*row, 5, rates)
        assert torch.equal(operands.gradients[n], row[1])
        assert operands.steps[n].item() == 5
        for place, e, p in zip((0, 2, 3, 4), exact, plain, strict=True):
            if e.numel():
                scale = max(x.abs().max().item() for x in (e, *row[:3]))  # differences lose what both sides had
                errors = [(x.double() - e).abs().max().item() for x in (operands[place][n], p)]
                assert errors[0] <= 2 * errors[1] + 4 * EPS * scale


@needs_c
@same_order
@EACH_RATES
def test_c_has_the_bits_of_the_fused_optimizer_and_lerp(changes):
    rates = rates_of(**changes)
    ours = operands_of()
    theirs = copied(ours)
    gradients = [numbers(SHAPES, 10 + k) for k in range(20)]
    gradients[19][6][3:6] = torch.tensor([math.inf, math.nan, 0.0])
    torch_steps(theirs, rates, gradients)
    for given in gradients:
        adamw_ema(ours._replace(gradients=given), rates)
    for name, own, other in zip(Operands._fields, ours, theirs, strict=True):
        for x, y in zip(own, other, strict=True):
            if name != "gradients":
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert ours.weights[6].isnan().any()


@needs_c
def test_the_number_of_threads_changes_no_bit():
    shapes = [(200_001,), (3,), (65_537,)]
    one, two = operands_of(shapes), operands_of(shapes)
    adamw_ema(one, rates_of())
    torch.set_num_threads(2)
    try:
        adamw_ema(two, rates_of())
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True))


@needs_c
def test_what_is_changed_says_so_and_what_is_read_does_not():
    operands = operands_of()
    before = [[x._version for x in row] for row in operands]
    adamw_ema(operands, rates_of())
    for name, row, versions in zip(Operands._fields, operands, before, strict=True):
        for x, version in zip(row, versions, strict=True):
            assert (x._version > version) == (name != "gradients"), name


def test_nothing_to_do_is_done():
    empty = Operands([], [], [], [], [], [])
    assert refuses(empty) == ""
    adamw_ema(empty, rates_of())


@needs_c
@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("gradients", torch.ones(4, dtype=torch.bfloat16), "it takes float32, got torch.bfloat16"),
        ("squares", torch.ones(5), "contiguous tensors of one shape"),
        ("weights", torch.ones(8)[::2], "contiguous tensors of one shape"),
        ("averages", torch.ones(4, device="meta"), "on one device, got cpu and meta"),
        ("gradients", torch.ones(4).to_sparse(), "contiguous tensors of one shape"),
        ("steps", torch.tensor(1.0, dtype=torch.float64), "steps in one float32 on cpu, got a Tensor, torch.float64"),
        ("moments", torch.ones(4).as_subclass(type("Marked", (torch.Tensor,), {})), "which a Marked may not have"),
    ],
)
def test_tensors_that_a_kernel_would_misread_are_refused(name, tensor, words):
    operands = operands_of([(4,)])
    assert refuses(operands) == ""
    assert words in refuses(operands._replace(**{name: [tensor]}))


def test_other_devices_and_missing_compilers_are_refused(monkeypatch):
    assert "for CPUs and CUDA, got meta" in refuses(Operands(*([x.to("meta")] for (x, *_) in operands_of())))
    monkeypatch.setattr(c, "unavailable", lambda: "there is no C compiler")
    assert refuses(operands_of()) == "there is no C compiler"
    monkeypatch.setattr(gpu, "INSTALLED", False)
    assert "triton" in package.triton_refusal(operands_of())


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, HERE / program],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])} | environment,
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr, done.stderr  # NaN and overflow inside the kernel
    return json.loads(done.stdout)


@needs_triton
def test_the_interpreted_kernel_is_as_exact_as_the_definition():
    found = run("interpret_adamw_ema.py")
    assert found["versions"]
    assert len(found["errors"]) == 8
    for case, offset, results in found["errors"]:
        for result, (fast, plain) in results.items():
            assert fast <= 2 * plain + 4 * EPS, (case, offset, result)


@needs_triton
def test_the_kernel_compiles_for_an_h200_and_reads_vectors_where_addresses_allow(tmp_path):
    found = run("compile_triton_adamw_ema.py", TRITON_CACHE_DIR=str(tmp_path))
    assert "ld.global.v4" in found["aligned"]
    assert "ld.global.v4" not in found["unaligned"]
    assert not any("local" in text for text in found.values())  # nothing spilled
