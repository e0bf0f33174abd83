"""Twin for short sequences in training on a CPU: two batched products, the scale folded into the queries."""

from torch import Tensor


def attention_matmul(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `attention_reference`; scaling the queries touches N E numbers instead of N M scores."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return scores.softmax(dim=-1).to(value.dtype) @ value
