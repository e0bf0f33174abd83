"""The residual sum of adaLN-Zero: a branch is added through a gate."""

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.gated_add.c import gated_add_c
from smalti.ops.gated_add.reference import gated_add_reference
from smalti.ops.pointwise import refuses_c, refuses_rows


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    x, gate, branch = args
    if reason := refuses_c(*args) or refuses_rows(x, gate):
        return reason
    if x.shape != branch.shape or (x.dtype, branch.dtype) == (torch.bfloat16, torch.float32):
        return f"it adds no {branch.dtype} of shape {tuple(branch.shape)} to {x.dtype} of shape {tuple(x.shape)}"
    return ""


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 40
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, branch = torch.randn(2, batch, tokens, channels, generator=generator)
    gate = torch.randn(batch, 1, channels, generator=generator)
    return tuple(t.to(dtype).requires_grad_() for t in (x, gate, branch))


def _macs(x: Tensor, gate: Tensor, branch: Tensor) -> dict[str, int]:
    return {}  # elementwise: not counted


gated_add = Op("gated_add", gated_add_reference, {"c": gated_add_c}, _refuses, _example, _macs)
