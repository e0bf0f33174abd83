"""Norm, per-token MLP, grid, output head: the plain parts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.nn.conditioning import Modulation
from smalti.ops import adaln, fold_affine, gelu


class Grid(NamedTuple):
    """Rows and columns of the tokens; row-major, token = row * columns + column."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


class Norm(nn.Module):
    """LayerNorm over the channels of each token, and then the shift and scale of a branch's modulation, if it has one.

    `affine` gives it a weight and a bias of its own; most networks have them only where nothing else shifts and scales.
    """

    def __init__(self, hidden_size: int, *, affine: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight = nn.Parameter(torch.ones(hidden_size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if affine else None

    def forward(self, x: Float[Tensor, "B N D"], m: Modulation | None = None) -> Float[Tensor, "B N D"]:
        if m is None:
            return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)
        shift, scale = m.shift, m.scale
        if self.weight is not None and self.bias is not None:
            shift, scale = fold_affine(shift, scale, self.weight, self.bias)
        return adaln(x, shift, scale, eps=self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias, the released initialisation of every plain layer."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Set weight and bias to zero, so that the branch behind the layer starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them, on each token alone."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.fc1 = linear(hidden_size, inner)
        self.fc2 = linear(inner, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


class Head(nn.Module):
    """Tokens to latents: norm, optional modulation, one linear layer, and the patches laid back on the plane.

    Inside a token the order is (row in patch, column in patch, channel).
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, modulation: nn.Module) -> None:
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.modulation = modulation
        self.norm = Norm(hidden_size, affine=not modulation.adaptive)
        self.out = zero_init(linear(hidden_size, patch_size**2 * out_channels))  # the network starts by saying zero

    def forward(self, x: Float[Tensor, "B N D"], cond: Float[Tensor, "B K"], grid: Grid) -> Float[Tensor, "B O H W"]:
        m: Modulation | None
        (m,) = self.modulation(cond)
        return unpatchify(self.out(self.norm(x, m)), grid, self.patch_size)


def unpatchify(tokens: Float[Tensor, "B N F"], grid: Grid, patch_size: int) -> Float[Tensor, "B O H W"]:
    """Lay tokens of (row in patch, column in patch, channel) values back on the plane."""
    p = patch_size
    x = tokens.view(tokens.shape[0], grid.rows, grid.columns, p, p, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, O, rows, p, columns, p)
    return x.reshape(x.shape[0], x.shape[1], grid.rows * p, grid.columns * p)
