"""Heads of cosine attention with rotary positions: split, turned and brought to their length at once."""

import torch
from torch import Tensor

from smalti.ops.cosine_heads.c import MAX_SIZE, cosine_heads_c
from smalti.ops.cosine_heads.plain import cosine_heads_plain
from smalti.ops.cosine_heads.reference import cosine_heads_reference
from smalti.ops.dispatch import Op
from smalti.ops.mixes import refuses_c


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    qkv, cos, sin, lengths = args
    if impl != "c":
        return ""
    tokens, heads, size = qkv.shape[1], qkv.shape[-2], qkv.shape[-1]
    if qkv.ndim != 5 or qkv.shape[2] != 3 or not cos.shape == sin.shape == (tokens, size // 2) or size % 2:
        shapes = [tuple(x.shape) for x in args]
        return f"it wants shapes (B, N, 3, H, E), (N, E / 2), (N, E / 2) and (2, H), got {shapes}"
    if lengths.shape != (2, heads) or size > MAX_SIZE:
        return (
            f"it wants lengths (2, H) and heads of at most {MAX_SIZE} channels, got {tuple(lengths.shape)} and {size}"
        )
    return refuses_c(*args)


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, heads: int = 3, head_size: int = 16
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, head_size, generator=generator)
    angle = 6 * torch.rand(tokens, head_size // 2, generator=generator)
    lengths = 1 + torch.rand(2, heads, generator=generator)
    return tuple(x.to(dtype).requires_grad_() for x in (qkv, angle.cos(), angle.sin(), lengths))


def _macs(qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> dict[str, int]:
    return {}  # elementwise: not counted


_FAST = {"c": cosine_heads_c, "plain": cosine_heads_plain}

cosine_heads = Op("cosine_heads", cosine_heads_reference, _FAST, _refuses, _example, _macs, batched=(0,))
