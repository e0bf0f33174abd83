"""Twin in C for CPUs: queries, keys and values are read once and written once, head by head."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.cosine_heads.plain import cosine_heads_plain
from smalti.ops.in_memory import KINDS, plain_gradients
from smalti.ops.mixes import call

MAX_SIZE = 512  # of a head, as in mixes.c


def cosine_heads_c(
    qkv: Float[Tensor, "B N 3 H E"],
    cos: Float[Tensor, "N F"],
    sin: Float[Tensor, "N F"],
    lengths: Float[Tensor, "2 H"],
) -> Float[Tensor, "B 3 H N E"]:
    """As `cosine_heads_reference`; queries, keys and values are contiguous each, as batched products want them."""
    return _CosineHeads.apply(qkv, cos, sin, lengths)


class _CosineHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(qkv, cos, sin, lengths)
        qkv, *tables = _as_c_reads(qkv, cos, sin, lengths)
        batch, tokens, _, heads, size = qkv.shape
        y = torch.empty(3, batch, heads, tokens, size, dtype=qkv.dtype)
        call("cosine_heads", KINDS[qkv.dtype], batch, tokens, heads, size, qkv, *tables, y)
        return y.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:  # angles are not trained
            return plain_gradients(cosine_heads_plain, inputs, above, create_graph=torch.is_grad_enabled())
        qkv, *tables = _as_c_reads(*inputs)
        batch, tokens, _, heads, size = qkv.shape
        by_qkv, by_lengths = torch.empty_like(qkv), torch.empty(2, heads)
        partial = torch.empty(batch, 2, heads)
        sizes = batch, tokens, heads, size
        call(
            "cosine_heads_back", KINDS[qkv.dtype], *sizes, qkv, *tables, above.contiguous(), by_qkv, partial, by_lengths
        )
        return by_qkv, None, None, by_lengths.to(inputs[3].dtype)


def _as_c_reads(qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> list[Tensor]:
    """Tables with a number per channel, sines negative for the first of a pair."""
    both = (cos.detach().float(), cos.detach().float()), (-sin.detach().float(), sin.detach().float())
    tables = [torch.stack(pair, dim=-1).flatten(-2) for pair in both]
    return [qkv.detach().contiguous(), *tables, lengths.detach().float().contiguous()]
