"""The definition. Source: Vision-RWKV, arXiv:2403.02308, sec. 3.2 (Q-shift); Diffusion-RWKV, arXiv:2404.04478."""

import torch
from jaxtyping import Float
from torch import Tensor


def quad_shift_reference(
    x: Float[Tensor, "B R Q D"], shift: int = 1, fraction: float = 0.25
) -> Float[Tensor, "B R Q D"]:
    """Each token takes four groups of channels from its left, right, upper and lower neighbour, and keeps the rest.

    Args:
        x: tokens on their grid, rows before columns.
        shift: how far away the neighbour is, in tokens; where there is none, the channels are zero.
        fraction: of the channels in one group; group k ends before channel int(D k fraction).
    """
    rows, columns, channels = x.shape[1:]
    down, right = min(shift, rows), min(shift, columns)  # nobody has a neighbour beyond the grid
    a, b, c, d = (int(channels * fraction * k) for k in (1, 2, 3, 4))
    y = torch.zeros_like(x)
    y[:, :, right:, :a] = x[:, :, : columns - right, :a]
    y[:, :, : columns - right, a:b] = x[:, :, right:, a:b]
    y[:, down:, :, b:c] = x[:, : rows - down, :, b:c]
    y[:, : rows - down, :, c:d] = x[:, down:, :, c:d]
    y[..., d:] = x[..., d:]
    return y
