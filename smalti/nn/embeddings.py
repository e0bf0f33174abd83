"""Patches, positions, timesteps: what turns the inputs of a network into tokens and vectors."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut latents into square patches and project each to a token, row by row.

    The weight has the shape of the convolution it stands for, (D, C, p, p). The product is taken as one matrix
    product over the cut patches, because on a CPU that is faster than a strided convolution, forward and backward.
    """

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.in_channels, self.patch_size = in_channels, patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        patches = patchify(latents.to(self.proj.weight.dtype), self.patch_size)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def patchify(latents: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N F"]:
    """Patches in row-major order; inside a patch the order is (channel, row, column), as a convolution reads it."""
    b, c, h, w = latents.shape
    p = patch_size
    x = latents.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, p)
    return x.reshape(b, (h // p) * (w // p), c * p * p)


def sincos_2d(rows: int, columns: int, hidden_size: int) -> Float[Tensor, "N D"]:
    """Fixed position vectors, float64: the first half of the channels encodes the column, the second half the row.

    Each half is [sin | cos] of the index times 10000^(-k / (D/4)), k = 0 .. D/4 - 1.

    Raises:
        ValueError: hidden_size is not divisible by 4.

    Source: released code of arXiv:2212.09748; the order of the halves is that of the code, not of its comments.
    """
    if hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} is not divisible by 4, which 2-D sin-cos positions need")
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = []
    # PARITY: column-first. The released comments name the halves the other way round.
    for index in (column, row):
        angle = index.flatten()[:, None].double() * omega  # (N, D/4)
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1)


def timestep_sinusoid(
    timesteps: Float[Tensor, "B"] | Int[Tensor, "B"], dim: int, *, closed: bool = False
) -> Float[Tensor, "B F"]:
    """[cos | sin] of timestep times 10000^(-k / half), k = 0 .. half - 1, in float32; an odd `dim` ends with a zero.

    Args:
        closed: the slowest frequency is 1 / 10000 itself, the divisor half - 1; so in diffusers, not in the papers.
    """
    half = dim // 2
    # PARITY: sinusoid-float32. As the released networks were trained; float64 differs by up to 4e-5 near t = 1000.
    k = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequency = torch.exp(-math.log(10000.0) * k / (half - closed))
    angle = timesteps.float()[:, None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim - 2 * half))


class TimestepEmbedding(nn.Module):
    """A sinusoid of 256 numbers through a two-layer MLP with SiLU."""

    sinusoid_size = 256

    def __init__(self, hidden_size: int, *, closed: bool = False) -> None:
        super().__init__()
        self.closed = closed
        self.fc1 = nn.Linear(self.sinusoid_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, timesteps: Float[Tensor, "B"] | Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        sinusoid = timestep_sinusoid(timesteps, self.sinusoid_size, closed=self.closed).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(sinusoid)))
