"""Sigmoid gate: how much of each number passes."""

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.mixes import refuses_c
from smalti.ops.sigmoid_gate.c import sigmoid_gate_c
from smalti.ops.sigmoid_gate.reference import sigmoid_gate_reference


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    gate, x = args
    if gate.shape != x.shape or gate.dtype != x.dtype:
        return f"it wants two tensors alike, got {tuple(gate.shape)} {gate.dtype} and {tuple(x.shape)} {x.dtype}"
    return refuses_c(*args)


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 48
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, channels)
    return tuple((2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for _ in range(2))


def _macs(gate: Tensor, x: Tensor) -> dict[str, int]:
    return {}  # elementwise: not counted


sigmoid_gate = Op("sigmoid_gate", sigmoid_gate_reference, {"c": sigmoid_gate_c}, _refuses, _example, _macs)
