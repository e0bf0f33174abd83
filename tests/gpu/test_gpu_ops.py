"""Every op and twin on CUDA: agreement with the reference in float64, and which of them is chosen."""

import pytest
import torch

from smalti.cost import disagreement
from smalti.ops import OPS, attention


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("tokens", [16, 57, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_every_twin_on_cuda_agrees_with_its_reference(device, name, dtype, tokens, gradients):
    op = OPS[name]
    for seed in range(3):
        args = tuple(
            a.detach().to(device).requires_grad_(gradients and a.is_floating_point())
            for a in op.example(tokens, dtype, seed=seed)
        )
        with torch.set_grad_enabled(gradients):
            runnable = [impl for impl in op.fast if not op.refuses(impl, args)]
        assert runnable
        found = {impl: disagreement(op, impl, args, gradients=gradients) for impl in runnable}
        assert found == dict.fromkeys(runnable, "")


@pytest.mark.parametrize("gradients", [False, True])
def test_attention_with_the_heads_of_the_largest_dit_agrees(device, gradients):
    # 72 channels per head are no power of two, and kernels treat them on paths of their own.
    args = attention.example(256, torch.bfloat16, heads=16, head_size=72)
    args = tuple(a.detach().to(device).requires_grad_(gradients) for a in args)
    assert disagreement(attention, "sdpa", args, gradients=gradients) == ""


def test_the_twin_for_cpus_refuses_cuda_and_is_not_chosen(device):
    args = tuple(a.detach().to(device).requires_grad_() for a in attention.example(16, torch.float32))
    with pytest.raises(ValueError, match="it is for CPUs, got cuda"):
        attention(*args, impl="matmul")
    assert attention(*args).device.type == "cuda"
