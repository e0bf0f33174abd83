"""Twin in C for CPUs: one pass each way, and nothing is kept but the inputs."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.in_memory import KINDS, plain_gradients
from smalti.ops.mixes import call
from smalti.ops.sigmoid_gate.reference import sigmoid_gate_reference


def sigmoid_gate_c(gate: Float[Tensor, "*S"], x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """As `sigmoid_gate_reference`; a bfloat16 result is rounded once."""
    return _SigmoidGate.apply(gate, x)


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x)
        gate, x = gate.detach().contiguous(), x.detach().contiguous()
        y = torch.empty_like(x)
        call("sigmoid_gate", KINDS[x.dtype], x.numel(), gate, x, y)
        return y

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        gate, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return plain_gradients(sigmoid_gate_reference, (gate, x), above, create_graph=True)
        gate, x, above = gate.contiguous(), x.contiguous(), above.contiguous()
        by_gate, by_x = torch.empty_like(x), torch.empty_like(x)
        call("sigmoid_gate_back", KINDS[x.dtype], x.numel(), gate, x, above, by_gate, by_x)
        return by_gate, by_x
