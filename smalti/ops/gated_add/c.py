"""Twin in C for CPUs: one pass each way."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.gated_add.reference import gated_add_reference
from smalti.ops.in_memory import KINDS, plain_gradients
from smalti.ops.pointwise import call, modulation_rows, partial_sums


def gated_add_c(
    x: Float[Tensor, "B N D"], gate: Float[Tensor, "M 1 D"], branch: Float[Tensor, "B N D"]
) -> Float[Tensor, "B N D"]:
    """As `gated_add_reference`; the gate's sum over tokens is made in one order, whatever the threads."""
    return _GatedAdd.apply(x, gate, branch)


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        ctx.save_for_backward(gate, branch)
        x, branch = x.contiguous(), branch.contiguous()
        (row,), stride = modulation_rows(gate)
        y = torch.empty_like(x)
        call("gated_add", KINDS[x.dtype], KINDS[branch.dtype], *x.shape, stride, x, row, branch, y)
        return y

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch = ctx.saved_tensors
        if torch.is_grad_enabled():
            zero = torch.zeros_like(above)
            by_gate, by_branch = plain_gradients(
                lambda g, b: gated_add_reference(zero, g, b), (gate, branch), above, create_graph=True
            )
            return above, by_gate, by_branch
        (row,), stride = modulation_rows(gate)
        g, branch = above.contiguous(), branch.contiguous()
        by_branch, partial = torch.empty_like(branch), partial_sums(branch, 1)
        sums = torch.empty(len(gate), 1, branch.shape[2], dtype=torch.float32)
        sizes = (KINDS[g.dtype], KINDS[branch.dtype], *branch.shape, stride)
        call("gated_add_back", *sizes, row, branch, g, by_branch, partial, sums)
        return above, sums.to(gate.dtype), by_branch
