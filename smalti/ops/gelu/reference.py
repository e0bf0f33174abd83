"""The definition. Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, sec. 2."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gelu_reference(x: Float[Tensor, "*S"], approximate: Literal["none", "tanh"] = "none") -> Float[Tensor, "*S"]:
    """x times the probability that a standard normal number is below it; "tanh" = the paper's approximation of that."""
    return F.gelu(x, approximate=approximate)
