"""Squared ReLU, the non-linearity of the channel mix."""

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.mixes import refuses_c
from smalti.ops.squared_relu.c import squared_relu_c
from smalti.ops.squared_relu.reference import squared_relu_reference


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    return refuses_c(*args)


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 48
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, tokens, channels, generator=generator).to(dtype).requires_grad_(),)


def _macs(x: Tensor) -> dict[str, int]:
    return {}  # elementwise: not counted


squared_relu = Op("squared_relu", squared_relu_reference, {"c": squared_relu_c}, _refuses, _example, _macs)
