"""Twin on PyTorch's own functions: all mixtures by one interpolation."""

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.quad_shift import quad_shift


def shift_mix_lerp(
    x: Float[Tensor, "B R Q D"], shares: Float[Tensor, "M D"], shift: int = 1, fraction: float = 0.25
) -> Float[Tensor, "B M R Q D"]:
    """As `shift_mix_reference`; each mixture is contiguous in memory, which linear layers want."""
    shifted = quad_shift(x, shift=shift, fraction=fraction)
    return torch.lerp(shifted[None], x[None], shares.to(x.dtype)[:, None, None, None]).transpose(0, 1)
