"""Tokens as a plane: 1x1 and depthwise convolutions on tokens laid out on their grid, without a copy.

A token tensor (B, N, D) seen as (B, D, rows, columns) already is channels-last in memory, where a 1x1 convolution is a
linear layer and depthwise convolutions are fastest. Weights keep the shapes of the convolutions they stand for.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti import ops
from smalti.nn.layers import Grid


def as_plane(x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B D rows columns"]:
    """The same memory, seen as channels-last maps."""
    return x.unflatten(1, tuple(grid)).permute(0, 3, 1, 2)


def as_tokens(x: Float[Tensor, "B D rows columns"]) -> Float[Tensor, "B N D"]:
    """`as_plane` turned round; free where the maps are channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps the grid, with Xavier-uniform weight and zero bias."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Pointwise(nn.Module):
    """A 1x1 convolution: a linear layer on each token, whose weight is (outputs, inputs, 1, 1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs, 1, 1)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "B N I"]) -> Float[Tensor, "B N D"]:
        return F.linear(x, self.weight.flatten(1), self.bias)


class Depthwise(nn.Module):
    """One k x k kernel per channel, (D, 1, k, k), on the plane of the tokens; outside it there are zeros."""

    def __init__(self, hidden_size: int, kernel_size: int) -> None:
        super().__init__()
        weight = torch.empty(hidden_size, 1, kernel_size, kernel_size)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        return depthwise(x, grid, self.weight, self.bias)


def depthwise(
    x: Float[Tensor, "B N D"], grid: Grid, weight: Float[Tensor, "D 1 k k"], bias: Float[Tensor, "D"]
) -> Float[Tensor, "B N D"]:
    """The convolution of `Depthwise` with a kernel of odd size that is given."""
    return ops.depthwise(x.unflatten(1, tuple(grid)), weight, bias).flatten(1, 2)


def with_shortcut(weight: Float[Tensor, "D 1 k k"]) -> Float[Tensor, "D 1 k k"]:
    """The kernel whose convolution also adds its input: one more at the centre."""
    identity = torch.zeros_like(weight[:1])
    identity[..., weight.shape[-1] // 2, weight.shape[-1] // 2] = 1
    return weight + identity
