"""GELU: a smooth step times its input, in the exact and in the tanh form."""

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.gelu.c import gelu_c
from smalti.ops.gelu.reference import gelu_reference
from smalti.ops.pointwise import refuses_c


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    return refuses_c(*args)


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 48
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return ((2 * torch.randn(batch, tokens, channels, generator=generator)).to(dtype).requires_grad_(),)


def _macs(x: Tensor) -> dict[str, int]:
    return {}  # elementwise: not counted


gelu = Op("gelu", gelu_reference, {"c": gelu_c}, _refuses, _example, _macs)
