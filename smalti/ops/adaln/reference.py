"""The definition, which is also the form for GPUs and compilers. Source: arXiv:2212.09748, sec. 3.2."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def adaln_reference(
    x: Float[Tensor, "B N D"], shift: Float[Tensor, "M 1 D"], scale: Float[Tensor, "M 1 D"], eps: float = 1e-6
) -> Float[Tensor, "B N D"]:
    """Each token less its mean, by its standard deviation, times 1 + scale, plus shift.

    Under autocast the result has autocast's type, because a linear layer that would cast it comes next.
    """
    return adaln_plain(x, shift, scale, eps, output_type(x))


def adaln_plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The same with the type of the result said aloud, for backward passes, which run outside autocast."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale).to(dtype)


def output_type(x: Tensor) -> torch.dtype:
    """That of x, or autocast's where it is on."""
    if x.is_meta or x.dtype == torch.float64:  # where there is no autocast, and what it leaves alone
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fold_affine(
    shift: Float[Tensor, "M 1 D"], scale: Float[Tensor, "M 1 D"], weight: Float[Tensor, "D"], bias: Float[Tensor, "D"]
) -> tuple[Float[Tensor, "M 1 D"], Float[Tensor, "M 1 D"]]:
    """Shift and scale that do to a plain norm what these do to one with weight and bias.

    (n w + b) (1 + s) + t = n (1 + s') + t'. At least float32, because w (1 + s) - 1 would lose digits in less.
    """
    dtype = torch.promote_types(scale.dtype, torch.float32)
    factor = 1 + scale.to(dtype)
    return torch.addcmul(shift.to(dtype), bias, factor), weight * factor - 1
