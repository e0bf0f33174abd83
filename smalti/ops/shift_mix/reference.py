"""The definition. Source: Vision-RWKV, arXiv:2403.02308, sec. 3.2 (Q-shift); Diffusion-RWKV, arXiv:2404.04478."""

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.quad_shift.reference import quad_shift_reference


def shift_mix_reference(
    x: Float[Tensor, "B R Q D"], shares: Float[Tensor, "M D"], shift: int = 1, fraction: float = 0.25
) -> Float[Tensor, "B M R Q D"]:
    """M mixtures of each token with what the quad shift brings it: share * own + (1 - share) * shifted.

    Args:
        x: tokens on their grid, rows before columns.
        shift, fraction: as in `quad_shift`.
    """
    shifted = quad_shift_reference(x, shift, fraction)
    return torch.stack([torch.lerp(shifted, x, share.to(x.dtype)) for share in shares], dim=1)
