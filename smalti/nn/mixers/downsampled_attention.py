"""Attention among the tokens of one phase of the grid: U-DiT's way to look at all of them for a quarter of the price.

Source: Tian et al. 2024, arXiv:2405.02730, sec. 3.2 and 3.3. Cosine attention with a learned temperature: Liu et al.
2022, arXiv:2111.09883, sec. 3.3; rotary positions: Su et al. 2021, arXiv:2104.09864, one axis on every second pair.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.nn.layers import Grid, linear
from smalti.nn.mixers.base import ALONE, MixerConfig, Place
from smalti.nn.plane import Depthwise, Pointwise, depthwise, with_shortcut
from smalti.ops import attention, cosine_heads, rotary

DownsamplerKind = Literal["dwconv5", "dwconv3"]
RotaryKind = Literal["rope2d", "rope2d_square", "none"]
_KERNEL = {"dwconv5": 5, "dwconv3": 3}


@dataclass(frozen=True, kw_only=True)
class DownsampledAttentionConfig(MixerConfig):
    """Attention within each of the factor^2 phases of the grid.

    Args:
        factor: a phase is every factor-th row and column; rows and columns must be divisible by it. 1 = one phase.
        downsampler: the depthwise convolution before the split, through which the phases hear of each other.
        shortcut: the convolution adds its input.
        cosine: queries and keys of length one and a learned temperature per head, instead of the scale E^-1/2.
        position: rope2d = rotate by row and column of the phase's own grid. rope2d_square = the released rule, which
            counts rows and columns as if the grid were square; the same on square grids.
    """

    kind: ClassVar[str] = "downsampled_attention"
    num_heads: int
    factor: int = 2
    downsampler: DownsamplerKind = "dwconv5"
    shortcut: bool = True
    cosine: bool = True
    position: RotaryKind = "rope2d"

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"factor {self.factor} of the downsampled attention must be at least 1; the paper's is 2")
        for name, kinds in (("downsampler", get_args(DownsamplerKind)), ("position", get_args(RotaryKind))):
            if (kind := getattr(self, name)) not in kinds:
                raise ConfigError(f"unknown {name} {kind!r}{did_you_mean(str(kind), kinds)}")


class DownsampledAttention(nn.Module):
    """Depthwise convolution, split into phases, attention inside each, and the phases laid back on the plane."""

    wide_parameters: ClassVar[tuple[str, ...]] = ("scale",)  # an exponent
    # PARITY: temperature-cap. As released, not the logarithm of 100 to more digits.
    max_scale = 4.6052

    def __init__(self, config: DownsampledAttentionConfig, hidden_size: int, place: Place = ALONE) -> None:
        super().__init__()
        heads = config.num_heads
        if heads < 1 or hidden_size % heads:
            raise ConfigError(f"hidden_size {hidden_size} cannot be split into {heads} heads: choose a divisor of it")
        if config.position != "none" and hidden_size // heads % 4:
            raise ConfigError(
                f"heads of {hidden_size // heads} channels ({hidden_size} in {heads}): rotary positions in two "
                "directions need a multiple of 4; choose another num_heads or position 'none'"
            )
        self.config = config
        self.depthwise = Depthwise(hidden_size, _KERNEL[config.downsampler])
        self.qkv = linear(hidden_size, 3 * hidden_size)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0))) if config.cosine else None
        self.out = Pointwise(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        """Mix image tokens.

        Raises:
            ValueError: there are other tokens than those of the grid, or the factor does not divide the grid.
        """
        f, heads = self.config.factor, self.config.num_heads
        if x.shape[1] != grid.tokens:
            raise ValueError(
                f"{x.shape[1]} tokens for a grid of {grid.rows}x{grid.columns}: downsampled attention convolves on the "
                "plane and takes no in-context tokens; choose another conditioning"
            )
        if grid.rows % f or grid.columns % f:
            raise ValueError(
                f"a grid of {grid.rows}x{grid.columns} cannot be split into phases: both must be divisible by the "
                f"factor {f} of the downsampled attention"
            )
        x = depthwise(x, grid, self.kernel(), self.depthwise.bias)
        small = Grid(grid.rows // f, grid.columns // f)
        x = x.unflatten(1, (small.rows, f, small.columns, f)).permute(0, 2, 4, 1, 3, 5)  # (B, f, f, rows, columns, D)
        qkv = self.qkv(x.reshape(-1, small.tokens, x.shape[-1])).unflatten(-1, (3, heads, -1))  # (B f f, n, 3, H, E)
        y = self._attend(qkv, small).transpose(1, 2)  # (B f f, n, H, E)
        y = y.reshape(-1, f, f, small.rows, small.columns, x.shape[-1]).permute(0, 3, 1, 4, 2, 5)
        return self.out(y.flatten(1, 4))  # one copy, from phases to rows

    def kernel(self) -> Float[Tensor, "D 1 k k"]:
        """The kernel of the convolution with its shortcut."""
        return with_shortcut(self.depthwise.weight) if self.config.shortcut else self.depthwise.weight

    def _attend(self, qkv: Float[Tensor, "P n 3 H E"], grid: Grid) -> Float[Tensor, "P H n E"]:
        # Angles and lengths in at least float32, as released; only the products of attention are in less.
        wide = torch.promote_types(qkv.dtype, torch.float32)
        tables = None
        if self.config.position != "none":
            square = self.config.position == "rope2d_square"
            tables = rope2d(grid, qkv.shape[-1], square=square, device=qkv.device)
        lengths = None
        if self.scale is not None:
            queries = self.scale.to(wide).clamp(max=self.max_scale).exp().flatten() * math.sqrt(qkv.shape[-1])
            lengths = torch.stack([queries, torch.ones_like(queries)])  # (2, H): the scale of attention, and keys of 1
        if tables is not None and lengths is not None:
            return attention(*cosine_heads(qkv, *tables, lengths).unbind(1))
        qk, v = qkv[:, :, :2].to(wide), qkv[:, :, 2]
        if tables is not None:
            qk = rotary(qk, *tables)
        if lengths is not None:
            qk = F.normalize(qk, dim=-1) * lengths[..., None]
        q, k = qk.to(v.dtype).unbind(2)
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def rope2d(
    grid: Grid, head_size: int, *, square: bool = False, device: torch.device | None = None
) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N F"]]:
    """Cosine and sine of the angle of each token and each pair of channels, E/2 pairs, in float32.

    Pair 2i turns by the column times 10000^(-4i / E), pair 2i + 1 by the row times the same.

    Args:
        square: count columns to the whole part of the root of N, whatever the grid; the released rule.

    Source: released code of arXiv:2405.02730.
    """
    # PARITY: rope-square-root. The released code lays tokens out on a square, whatever their grid.
    columns = math.isqrt(grid.tokens) if square else grid.columns
    token = torch.arange(grid.tokens, device=device)
    # PARITY: rope-float32. As the released networks were trained; whatever their dtype.
    frequency = 1.0 / 10000.0 ** (torch.arange(0, head_size, 4, dtype=torch.float32, device=device) / head_size)
    place = torch.stack([token % columns, token // columns], dim=-1).float()  # (N, 2): column, row
    angle = (frequency[:, None] * place[:, None]).flatten(1)  # (N, E/2)
    angle = angle.double()  # of float32 angles the nearest cosines: the released table to the last bit
    return angle.cos().float(), angle.sin().float()
