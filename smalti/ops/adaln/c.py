"""Twin in C for CPUs: norm, scale, shift and the cast of autocast in one pass, statistics in float32."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.adaln.reference import adaln_plain, output_type
from smalti.ops.in_memory import KINDS, plain_gradients
from smalti.ops.pointwise import call, modulation_rows, partial_sums


def adaln_c(
    x: Float[Tensor, "B N D"], shift: Float[Tensor, "M 1 D"], scale: Float[Tensor, "M 1 D"], eps: float = 1e-6
) -> Float[Tensor, "B N D"]:
    """As `adaln_reference`; the sums over tokens in the gradients are made in one order, whatever the threads."""
    return _AdaLN.apply(x, shift, scale, eps, output_type(x))


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        kept = torch.empty(*x.shape[:2], 2, dtype=torch.float32) if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(x, shift, scale, kept)
        ctx.eps, ctx.dtype = eps, dtype
        x = x.contiguous()
        rows, stride = modulation_rows(shift, scale)
        y = torch.empty_like(x, dtype=dtype)
        call("adaln", KINDS[x.dtype], KINDS[dtype], *x.shape, stride, x, *rows, eps, y, kept)
        return y

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = partial(adaln_plain, eps=ctx.eps, dtype=ctx.dtype)
            return *plain_gradients(plain, (x, shift, scale), above, create_graph=True), None, None
        (rows,), stride = modulation_rows(scale)
        x, above = x.contiguous(), above.contiguous()
        by_x, blocks = torch.empty_like(x), partial_sums(x, 2)
        sums = torch.empty(len(scale), 2, 1, x.shape[2], dtype=torch.float32)
        sizes = (KINDS[x.dtype], KINDS[ctx.dtype], *x.shape, stride)
        call("adaln_back", *sizes, x, rows, kept, above, by_x, blocks, sums)
        return by_x, sums[:, 0].to(shift.dtype), sums[:, 1].to(scale.dtype), None, None
