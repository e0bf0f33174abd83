"""The definition: two gates on one another, as the fusion of DiffuSSM (arXiv:2311.18257, sec. 3) has them."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gelu_product_reference(a: Float[Tensor, "*S"], b: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """GELU of both, in the exact form, multiplied."""
    return F.gelu(a) * F.gelu(b)
