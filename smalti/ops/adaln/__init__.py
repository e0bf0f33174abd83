"""adaLN: a norm whose shift and scale come from the conditioning."""

import torch
from torch import Tensor

from smalti.ops.adaln.c import adaln_c
from smalti.ops.adaln.reference import adaln_reference, fold_affine, output_type
from smalti.ops.dispatch import Op
from smalti.ops.in_memory import KINDS
from smalti.ops.pointwise import refuses_c, refuses_rows

__all__ = ["adaln", "fold_affine"]


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    if reason := refuses_c(*args) or refuses_rows(*args):
        return reason
    x = args[0]
    if (dtype := output_type(x)) not in KINDS or (dtype, x.dtype) == (torch.float32, torch.bfloat16):
        return f"it makes no {dtype} from {x.dtype}"
    return ""


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 40
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(batch, tokens, channels, generator=generator) + 1
    shift, scale = 0.5 * torch.randn(2, batch, 1, channels, generator=generator)
    return tuple(t.to(dtype).requires_grad_() for t in (x, shift, scale))


def _macs(x: Tensor, shift: Tensor, scale: Tensor) -> dict[str, int]:
    return {}  # elementwise: not counted


adaln = Op("adaln", adaln_reference, {"c": adaln_c}, _refuses, _example, _macs)
