"""Mixtures of each token with its four neighbours, what Diffusion-RWKV makes keys, values and gates of."""

import math

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.mixes import refuses_c
from smalti.ops.shift_mix.c import shift_mix_c
from smalti.ops.shift_mix.lerp import shift_mix_lerp
from smalti.ops.shift_mix.reference import shift_mix_reference


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    x, shares = args
    if impl != "c":
        return ""
    if x.ndim != 4 or shares.shape[1:] != x.shape[3:]:
        return f"it wants shapes (B, R, Q, D) and (M, D), got {tuple(x.shape)} and {tuple(shares.shape)}"
    return refuses_c(*args)


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 18, mixtures: int = 3
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = max(r for r in range(1, math.isqrt(tokens) + 1) if tokens % r == 0)
    x = torch.randn(batch, rows, tokens // rows, channels, generator=generator).to(dtype)
    shares = torch.rand(mixtures, channels, generator=generator).to(dtype)
    return x.requires_grad_(), shares.requires_grad_()


def _macs(x: Tensor, shares: Tensor) -> dict[str, int]:
    return {}  # elementwise: not counted


_FAST = {"c": shift_mix_c, "lerp": shift_mix_lerp}

shift_mix = Op("shift_mix", shift_mix_reference, _FAST, _refuses, _example, _macs, batched=(0,))
