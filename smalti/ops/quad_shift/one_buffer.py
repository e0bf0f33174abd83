"""Twin for training: each number is written once, and the gradient is the same walk the other way round.

Autograd, looking at the reference's five writes, copies the whole gradient for each of them.
"""

from typing import Any

import torch
from torch import Tensor


def quad_shift_one_buffer(x: Tensor, shift: int = 1, fraction: float = 0.25) -> Tensor:
    """As `quad_shift_reference`."""
    return _QuadShift.apply(x, shift, fraction)


class _QuadShift(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, shift: int, fraction: float) -> Tensor:
        return _moved(x, shift, fraction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, float], output: Tensor) -> None:
        _, ctx.shift, ctx.fraction = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # A shift is a matrix of zeros and ones; its transpose takes every group from the opposite neighbour.
        return _QuadShift.apply(gradient, -ctx.shift, ctx.fraction), None, None


def _moved(x: Tensor, shift: int, fraction: float) -> Tensor:
    channels = x.shape[3]
    a, b, c, d = (int(channels * fraction * k) for k in (1, 2, 3, 4))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for axis, by, group in ((2, shift, slice(0, a)), (2, -shift, slice(a, b)), (1, shift, slice(b, c))):
        _move(x[..., group], y[..., group], axis, by)
    _move(x[..., c:d], y[..., c:d], 1, -shift)
    y[..., d:].copy_(x[..., d:])
    return y


def _move(source: Tensor, target: Tensor, axis: int, by: int) -> None:
    """Write `source`, moved along one axis, with zeros behind it."""
    length = source.shape[axis]
    gap = min(abs(by), length)
    kept = length - gap
    if by > 0:
        target.narrow(axis, 0, gap).zero_()
        target.narrow(axis, gap, kept).copy_(source.narrow(axis, 0, kept))
    else:
        target.narrow(axis, kept, gap).zero_()
        target.narrow(axis, 0, kept).copy_(source.narrow(axis, gap, kept))
