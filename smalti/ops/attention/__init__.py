"""Softmax attention."""

import torch
from torch import Tensor

from smalti.ops.attention.matmul import attention_matmul
from smalti.ops.attention.reference import attention_reference
from smalti.ops.attention.sdpa import attention_sdpa
from smalti.ops.dispatch import Op

# Up to here the two matrix products of a CPU beat the fused kernel, whose backward is slow: on short sequences, and by
# far in half precision, where the products run on matrix units; `python -m benchmarks ops` prints both.
MATMUL_TOKENS = {torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    query, key, _ = args
    if impl == "matmul":
        if query.device.type != "cpu":
            return f"it is for CPUs, got {query.device.type}"
        if not (torch.is_grad_enabled() and query.requires_grad):
            return "it only pays in training, where the backward of the fused kernel is slow on short sequences"
        limit = MATMUL_TOKENS.get(query.dtype, MATMUL_TOKENS[torch.float32])
        if key.shape[-2] > limit:
            return f"it keeps the whole score matrix: {key.shape[-2]} tokens, at most {limit}"
    return ""


def _example(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, heads: int = 3, head_size: int = 16
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, head_size)
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3))


def _macs(query: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    return {"attention": query.numel() * key.shape[-2] + query.numel() // query.shape[-1] * value.shape[-2:].numel()}


attention = Op(
    "attention", attention_reference, {"matmul": attention_matmul, "sdpa": attention_sdpa}, _refuses, _example, _macs
)
