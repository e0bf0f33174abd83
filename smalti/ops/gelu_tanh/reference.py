"""The definition. Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, sec. 2."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def gelu_tanh_reference(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
