"""Rotary positions: neighbouring channels turned by an angle that depends on the place of the token."""

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.rotary.complex import rotary_complex
from smalti.ops.rotary.reference import rotary_reference


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    if impl == "complex":
        if args[0].dtype not in (torch.float32, torch.float64):
            return f"there are no complex numbers for {args[0].dtype}"
        if torch.compiler.is_compiling():
            return "the compiler makes one pass of the real arithmetic by itself, and none of complex"
    return ""


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, heads: int = 3, head_size: int = 16
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads, head_size, generator=generator).to(dtype).requires_grad_()
    angle = 6 * torch.rand(tokens, head_size // 2, generator=generator)
    return x, *(table.to(dtype).requires_grad_() for table in (angle.cos(), angle.sin()))


def _macs(x: Tensor, cos: Tensor, sin: Tensor) -> dict[str, int]:
    return {}  # elementwise, like norms and gates: not counted


rotary = Op("rotary", rotary_reference, {"complex": rotary_complex}, _refuses, _example, _macs, batched=(0,))
