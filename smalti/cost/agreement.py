"""Whether a fast implementation computes what the reference computes. What does not is not worth timing."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.ops import Op


def disagreement(op: Op, impl: str, args: Sequence[Tensor], *, gradients: bool) -> str:
    """ "" when `impl` is at most twice as wrong as the reference in the same dtype, else the first result that is not.

    Both are compared with the reference in float64 on the same inputs, output and gradients each relative to its own
    largest value. On top come one rounding of the result to its dtype, and the rounding of sums kept in float32, which
    wanders with the root of their length: the longest dimension of the inputs bounds that. A gradient that cancels to
    nothing is measured against the largest of all.

    Args:
        impl: an implementation that does not refuse `args` (as a caller with or without gradients would pass them).
        gradients: also compare the gradients of all floating inputs; else run as in inference.

    Raises:
        ValueError: the implementation cannot take these inputs.
    """
    exact = _run(op, "reference", [_cast(a, torch.float64) for a in args], gradients)
    reference = _run(op, "reference", args, gradients)
    ours = _run(op, impl, args, gradients)
    longest = max(max(a.shape, default=1) for a in args)
    rounding = torch.finfo(args[0].dtype).eps + 2 * math.sqrt(longest) * torch.finfo(torch.float32).eps
    largest = max(tensor.abs().max().item() for tensor in exact.values())
    for name, truth in exact.items():
        scale = truth.abs().max().item()
        scale = scale if scale > rounding * largest else largest or 1.0
        error, limit = _error(ours[name], truth, scale), 2 * _error(reference[name], truth, scale) + rounding
        if not error <= limit:
            return f"{name} is off by {error:.2e} of the largest value, at most {limit:.2e} is allowed"
    return ""


def _run(op: Op, impl: str, args: Sequence[Tensor], gradients: bool) -> dict[str, Tensor]:
    inputs = [a.detach().requires_grad_(gradients and a.is_floating_point()) for a in args]
    with torch.set_grad_enabled(gradients):
        output = op(*inputs, impl=impl)
    if not gradients:
        return {"output": output}
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)
    sources = [a for a in inputs if a.requires_grad]
    found = torch.autograd.grad(output, sources, weights)
    return {"output": output.detach()} | {f"gradient {i}": g for i, g in enumerate(found)}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


def _error(value: Tensor, truth: Tensor, scale: float) -> float:
    return (value.double() - truth).abs().max().item() / scale
