"""Twin in C for CPUs: tokens are read once, mixtures written once, and shifted tokens never exist as a whole."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.in_memory import KINDS, lower_dtype, plain_gradients
from smalti.ops.mixes import call
from smalti.ops.shift_mix.lerp import shift_mix_lerp


def shift_mix_c(
    x: Float[Tensor, "B R Q D"], shares: Float[Tensor, "M D"], shift: int = 1, fraction: float = 0.25
) -> Float[Tensor, "B M R Q D"]:
    """As `shift_mix_reference`; under autocast in its dtype, because products follow."""
    return _ShiftMix.apply(x, shares, shift, fraction)


class _ShiftMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, shift: int, fraction: float) -> Tensor:
        ctx.save_for_backward(x, shares)
        ctx.shift, ctx.fraction = shift, fraction
        x, rows = x.detach().contiguous(), shares.detach().float().contiguous()
        y = torch.empty(len(shares), *x.shape, dtype=lower_dtype(x)).transpose(0, 1)
        call("shift_mix", KINDS[x.dtype], KINDS[y.dtype], *_sizes(x, y, shift, fraction), x, rows, y)
        return y

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, shares = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(x: Tensor, shares: Tensor) -> Tensor:
                return shift_mix_lerp(x, shares, ctx.shift, ctx.fraction)

            return *plain_gradients(plain, (x, shares), above, create_graph=True), None, None
        x, rows = x.contiguous(), shares.float().contiguous()
        if above.stride()[2:] != x.stride()[1:]:
            above = above.contiguous()
        by_x, by_shares = torch.empty_like(x), torch.empty_like(rows)
        partial = torch.empty(*x.shape[:2], *rows.shape)
        kinds, sizes = (KINDS[x.dtype], KINDS[above.dtype]), _sizes(x, above, ctx.shift, ctx.fraction)
        call("shift_mix_back", *kinds, *sizes, x, rows, above, by_x, partial, by_shares)
        return by_x, by_shares.to(shares.dtype), None, None


def _sizes(x: Tensor, mixtures: Tensor, shift: int, fraction: float) -> list[int]:
    """Sizes, shift, the ends of the four groups of channels, and where each mixture begins, as C wants them."""
    ends = [int(x.shape[3] * fraction * k) for k in (1, 2, 3, 4)]
    return [*x.shape, mixtures.shape[1], shift, *ends, *mixtures.stride()[:2]]
