"""Twin in C for CPUs: one pass each way, and nothing is kept but the input."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.in_memory import KINDS, plain_gradients
from smalti.ops.mixes import call
from smalti.ops.squared_relu.reference import squared_relu_reference


def squared_relu_c(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """As `squared_relu_reference`; the square of a bfloat16 is rounded once."""
    return _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _run(x, None)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor | None:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return plain_gradients(squared_relu_reference, (x,), above, create_graph=True)[0]
        return _run(x, above.contiguous())


def _run(x: Tensor, above: Tensor | None) -> Tensor:
    x = x.detach().contiguous()
    y = torch.empty_like(x)
    call("squared_relu", KINDS[x.dtype], x.numel(), x, above, y)
    return y
