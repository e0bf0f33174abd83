"""The definition: each channel of the plane with its own small kernel."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def depthwise_reference(
    x: Float[Tensor, "B R C D"], weight: Float[Tensor, "D 1 k k"], bias: Float[Tensor, "D"]
) -> Float[Tensor, "B R C D"]:
    """Sum over the k^2 neighbours of their value times the kernel's, plus the bias; outside the plane there are zeros.

    k is odd, and the kernel is not turned round, as in every convolution of a network.
    """
    (rows, columns), k = x.shape[1:3], weight.shape[-1]
    padded = F.pad(x, (0, 0, k // 2, k // 2, k // 2, k // 2))
    y = bias.expand_as(x)
    for i in range(k):
        for j in range(k):
            y = y + padded[:, i : i + rows, j : j + columns] * weight[:, 0, i, j]
    return y
