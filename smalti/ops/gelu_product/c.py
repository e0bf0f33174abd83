"""Twin in C for CPUs: one pass each way, and nothing is kept but the inputs."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.gelu_product.reference import gelu_product_reference
from smalti.ops.in_memory import KINDS, plain_gradients
from smalti.ops.pointwise import call


def gelu_product_c(a: Float[Tensor, "*S"], b: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """As `gelu_product_reference`, rounded once."""
    return _GeluProduct.apply(a, b)


class _GeluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        a, b = a.contiguous(), b.contiguous()
        y = torch.empty_like(a)
        call("gelu_product", KINDS[a.dtype], a.numel(), a, b, y)
        return y

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        if torch.is_grad_enabled():
            return plain_gradients(gelu_product_reference, (a, b), above, create_graph=True)
        a, b, above = a.contiguous(), b.contiguous(), above.contiguous()
        by_a, by_b = torch.empty_like(a), torch.empty_like(b)
        call("gelu_product_back", KINDS[a.dtype], a.numel(), a, b, above, by_a, by_b)
        return by_a, by_b
