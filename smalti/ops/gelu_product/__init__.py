"""GELU times GELU: what two branches say of each other."""

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.gelu_product.c import gelu_product_c
from smalti.ops.gelu_product.reference import gelu_product_reference
from smalti.ops.pointwise import refuses_c


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    a, b = args
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"it wants two tensors alike, got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
    return refuses_c(a, b)


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 48
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    pair = 2 * torch.randn(2, batch, tokens, channels, generator=generator)
    return tuple(x.to(dtype).requires_grad_() for x in pair)


def _macs(a: Tensor, b: Tensor) -> dict[str, int]:
    return {}  # elementwise: not counted


gelu_product = Op("gelu_product", gelu_product_reference, {"c": gelu_product_c}, _refuses, _example, _macs)
