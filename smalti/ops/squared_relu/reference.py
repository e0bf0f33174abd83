"""The definition. Source: So et al. 2021, arXiv:2109.08668, sec. 3 (squared ReLU)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def squared_relu_reference(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """max(x, 0)^2, number by number."""
    return F.relu(x).square()
