"""Depthwise convolution of tokens on their grid."""

import math

import torch
from torch import Tensor

from smalti.ops.depthwise.c import depthwise_c, refuses_c
from smalti.ops.depthwise.conv import depthwise_conv
from smalti.ops.depthwise.reference import depthwise_reference
from smalti.ops.dispatch import Op


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    if impl != "c":
        return ""
    if not (torch.is_grad_enabled() and any(a.requires_grad for a in args)):
        return "it only pays in training: forward alone, the convolution that PyTorch has is faster"
    return refuses_c(*args)


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 12, kernel_size: int = 5
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
    shapes = ((batch, rows, tokens // rows, channels), (channels, 1, kernel_size, kernel_size), (channels,))
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


def _macs(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, int]:
    return {"conv": x.numel() * weight.shape[-2:].numel()}


_FAST = {"c": depthwise_c, "conv": depthwise_conv}

depthwise = Op("depthwise", depthwise_reference, _FAST, _refuses, _example, _macs, batched=(0,))
