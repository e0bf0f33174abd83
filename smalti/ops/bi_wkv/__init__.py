"""Bi-WKV: a mean over all tokens whose weights decay with distance, in both directions, per channel."""

import torch
from torch import Tensor

from smalti.ops.bi_wkv.c import KINDS, bi_wkv_c, unavailable
from smalti.ops.bi_wkv.prefix import bi_wkv_prefix
from smalti.ops.bi_wkv.reference import bi_wkv_reference
from smalti.ops.bi_wkv.release import bi_wkv_release as _release
from smalti.ops.bi_wkv.triton import bi_wkv_triton, triton_refusal
from smalti.ops.dispatch import Op


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    decay, bonus, key, value = args
    if key.shape != value.shape or not decay.shape == bonus.shape == key.shape[2:]:
        return f"it wants shapes (C), (C), (B, N, C), (B, N, C), got {[tuple(x.shape) for x in args]}"
    if impl == "c":
        if any(x.device.type != "cpu" for x in args):
            return f"it is for CPUs, got {key.device.type}"
        if any(x.dtype not in KINDS for x in args):
            return f"it takes {', '.join(str(dtype) for dtype in KINDS)}, got {[str(x.dtype) for x in args]}"
        return unavailable()
    return triton_refusal(args) if impl == "triton" else ""


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 12
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.linspace(-5, 3, channels) + 0.5 * torch.randn(channels, generator=generator)
    bonus = torch.randn(channels, generator=generator)
    key, value = torch.randn(2, batch, tokens, channels, generator=generator)
    return tuple(x.to(dtype).requires_grad_() for x in (decay / tokens, bonus / tokens, key, value))


def _macs(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    # 13 operations per token and channel, as the paper counts; two operations are one multiply-add.
    return {"scan": 13 * key.numel() // 2}


_FAST = {"triton": bi_wkv_triton, "c": bi_wkv_c, "prefix": bi_wkv_prefix}

bi_wkv = Op("bi_wkv", bi_wkv_reference, _FAST, _refuses, _example, _macs, batched=(2, 3))
bi_wkv_release = Op("bi_wkv_release", _release, {}, _refuses, _example, _macs, batched=(2, 3))
