"""Twin in C for CPUs: one pass each way, and nothing is kept but the input."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.gelu.reference import gelu_reference
from smalti.ops.in_memory import KINDS, plain_gradients
from smalti.ops.pointwise import call


def gelu_c(x: Float[Tensor, "*S"], approximate: Literal["none", "tanh"] = "none") -> Float[Tensor, "*S"]:
    """As `gelu_reference`, float32 inside for bfloat16 too; without its cancellation, so -inf gives 0."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"unknown approximate {approximate!r}: choose 'none' or 'tanh'")
    return _Gelu.apply(x, approximate)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: Literal["none", "tanh"]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        x = x.contiguous()
        y = torch.empty_like(x)
        call("gelu", KINDS[x.dtype], approximate == "tanh", x.numel(), x, None, y)
        return y

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            (by_x,) = plain_gradients(lambda x: gelu_reference(x, ctx.approximate), (x,), above, create_graph=True)
            return by_x, None
        x, above = x.contiguous(), above.contiguous()
        by_x = torch.empty_like(x)
        call("gelu", KINDS[x.dtype], ctx.approximate == "tanh", x.numel(), x, above, by_x)
        return by_x, None
