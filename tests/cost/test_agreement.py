"""The check that stands before every timing: it must pass what is right and catch what is slightly wrong."""

import dataclasses

import pytest
import torch

from smalti.cost import disagreement
from smalti.ops import OPS, attention

ARGS = attention.example(33, torch.float32, seed=1)


def variant(function):
    return dataclasses.replace(attention, fast={"ours": function}, refuses=lambda impl, args: "")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_every_twin_agrees_with_its_reference(name, dtype, gradients):
    op = OPS[name]
    for tokens in (16, 57):
        args = tuple(a.requires_grad_(gradients) for a in op.example(tokens, dtype, seed=tokens))
        with torch.set_grad_enabled(gradients):
            runnable = [impl for impl in op.fast if not op.refuses(impl, args)]
            assert [disagreement(op, impl, args, gradients=gradients) for impl in runnable] == [""] * len(runnable)


def test_a_small_error_of_the_output_is_caught():
    wrong = variant(lambda q, k, v: attention.reference(q, k, v) * (1 + 1e-5))
    assert disagreement(wrong, "ours", ARGS, gradients=False).startswith("output is off by")


def test_a_wrong_gradient_behind_a_right_output_is_caught():
    wrong = variant(lambda q, k, v: attention.reference(q, k.detach() + 0 * k, v))
    assert disagreement(wrong, "ours", ARGS, gradients=False) == ""
    assert disagreement(wrong, "ours", ARGS, gradients=True).startswith("gradient 1 is off by")


def test_a_gradient_that_cancels_to_nothing_is_measured_against_the_others():
    # One token is all of its own mean: queries and keys do nothing, and rounding is all that their gradients hold.
    args = attention.example(1, torch.float32, seed=2)
    assert disagreement(attention, "matmul", args, gradients=True) == ""
    wrong = variant(lambda q, k, v: attention.reference(q, k, v) + 1e-5 * (q - q.detach()))
    assert disagreement(wrong, "ours", args, gradients=True).startswith("gradient 0 is off by")


def test_nan_is_caught():
    wrong = variant(lambda q, k, v: attention.reference(q, k, v) * float("nan"))
    assert disagreement(wrong, "ours", ARGS, gradients=False).startswith("output is off by nan")


def test_sums_kept_in_bfloat16_are_caught():
    def coarse(q, k, v):
        scores = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        total = torch.zeros_like(q)
        for i in range(k.shape[-2]):
            total = total + scores[..., i, None] * v[..., i, None, :]
        return total

    args = attention.example(512, torch.bfloat16, seed=3)
    assert disagreement(variant(coarse), "ours", args, gradients=False).startswith("output is off by")


def test_inputs_are_left_as_they_are():
    before = [a.detach().clone() for a in ARGS]
    disagreement(attention, "sdpa", ARGS, gradients=True)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(ARGS, before, strict=True))
