"""The definition. Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1."""

import math

from jaxtyping import Float
from torch import Tensor


def attention_reference(
    query: Float[Tensor, "B H N E"], key: Float[Tensor, "B H M E"], value: Float[Tensor, "B H M E"]
) -> Float[Tensor, "B H N E"]:
    """Mean of `value` over all M tokens, weighted by the softmax of query . key / sqrt(E)."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, H, N, M)
    return scores.softmax(dim=-1).to(value.dtype) @ value
