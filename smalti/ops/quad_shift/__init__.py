"""Quad-directional shift: four groups of channels come from the four neighbours on the grid."""

import math

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.quad_shift.one_buffer import quad_shift_one_buffer
from smalti.ops.quad_shift.reference import quad_shift_reference


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    return ""


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 18
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
    return (torch.randn(batch, rows, tokens // rows, channels, generator=generator).to(dtype).requires_grad_(),)


def _macs(x: Tensor) -> dict[str, int]:
    return {}  # numbers are moved, not multiplied


quad_shift = Op("quad_shift", quad_shift_reference, {"one_buffer": quad_shift_one_buffer}, _refuses, _example, _macs)
