"""Twin for bfloat16 on a CPU: there are only 65,536 inputs, so the answer to each is looked up.

PyTorch's kernel evaluates the hyperbolic tangent for every element and takes about twice as long, forward and backward
(`python -m benchmarks ops`); the table is also more exact, because each entry is rounded once, from float64.
"""

import functools

import torch
from torch import Tensor

from smalti.ops.gelu_tanh.reference import gelu_tanh_reference


@functools.cache
def _tables() -> tuple[Tensor, Tensor]:
    """Value and derivative for every bit pattern, as bfloat16 (65536,); 256 KB, made in a few milliseconds."""
    with torch.enable_grad():
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
        x = bits.view(torch.bfloat16).double().requires_grad_()
        value = gelu_tanh_reference(x)
        # Far out, the cube overflows and the formula's derivative is 0 times infinity; the limits are 0 and 1.
        (slope,) = torch.autograd.grad(value.sum(), x)
    x = x.detach()
    value = torch.where(x < -100, torch.zeros_like(x), value.detach())
    slope = torch.where(x.abs() > 100, (x > 0).double(), slope)
    nothing = x.isnan()
    return tuple(torch.where(nothing, x, table).to(torch.bfloat16) for table in (value, slope))  # type: ignore[return-value]


def _look_up(table: Tensor, x: Tensor) -> Tensor:
    bits = x.view(torch.uint16).reshape(-1).to(torch.int32)
    return torch.index_select(table, 0, bits).view(x.shape)


class _GeluTable(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _look_up(_tables()[0], x)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _look_up(_tables()[1], x).mul_(gradients[0])


def gelu_tanh_table(x: Tensor) -> Tensor:
    """As `gelu_tanh_reference`, by looking up the nearest bfloat16 to the exact value."""
    return _GeluTable.apply(x)
