"""The definition. Source: Su et al. 2021, arXiv:2104.09864, sec. 3.2.2 and eq. 34."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_reference(
    x: Float[Tensor, "B N *heads E"], cos: Float[Tensor, "N F"], sin: Float[Tensor, "N F"]
) -> Float[Tensor, "B N *heads E"]:
    """Turn each pair of neighbouring channels, E = 2 F, by the angle of its token and pair."""
    shape = (cos.shape[0], *[1] * (x.ndim - 3), cos.shape[1])
    cos, sin = cos.view(shape).to(x.dtype), sin.view(shape).to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
