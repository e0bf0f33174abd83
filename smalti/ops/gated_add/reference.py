"""The definition, which is also the form for GPUs and compilers. Source: arXiv:2212.09748, sec. 3.2."""

import torch
from jaxtyping import Float
from torch import Tensor


def gated_add_reference(
    x: Float[Tensor, "B N D"], gate: Float[Tensor, "M 1 D"], branch: Float[Tensor, "B N D"]
) -> Float[Tensor, "B N D"]:
    """x + gate branch, in the type of x, the residual stream, which may be wider than that of the branch."""
    return torch.addcmul(x, gate, branch).to(x.dtype)
