"""DiT: a plain stack of blocks over patch tokens. Source: Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.models.base import BackboneConfig, check_patches, check_timesteps, patch_grid
from smalti.models.pretrained import Pretrained
from smalti.nn.conditioning import (
    Conditioning,
    ConditioningKind,
    CrossAttention,
    NoContext,
    PrependContext,
    add_branch,
    build_head_modulation,
    build_modulation,
)
from smalti.nn.embeddings import PatchEmbed, sincos_2d
from smalti.nn.layers import MLP, Grid, Head, Norm
from smalti.nn.mixers import AttentionConfig, MixerConfig, Place, build_mixer

PositionKind = Literal["sincos_2d", "table"]
FrequencyKind = Literal["half_open", "closed"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig(BackboneConfig):
    """Settings of a DiT; the presets of the paper are in `smalti.presets.dit`."""

    kind: ClassVar[str] = "dit"
    hidden_size: int
    depth: int
    mixer: MixerConfig
    patch_size: int = 2
    mlp_ratio: float = 4.0
    conditioning: ConditioningKind = "adaln_zero"
    context_heads: int | None = None  # heads of the cross-attention; None = as many as the mixer has
    position: PositionKind = "sincos_2d"  # "table": vectors came with the weights, one grid only
    timestep_frequencies: FrequencyKind = "half_open"  # "closed": as diffusers computes them, the slowest 1 / 10000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patches(self.sample_size, self.patch_size)
        if self.hidden_size < 4 or self.hidden_size % 4 or self.depth < 1:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and depth {self.depth} at least 1"
            )
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ConfigError(f"mlp_ratio {self.mlp_ratio} leaves no channels inside the MLP: the papers' is 4.0")
        choices = {
            "conditioning": ConditioningKind,
            "position": PositionKind,
            "timestep_frequencies": FrequencyKind,
        }
        for name, kinds in ((name, get_args(choice)) for name, choice in choices.items()):
            if (kind := getattr(self, name)) not in kinds:
                raise ConfigError(f"unknown {name} {kind!r}{did_you_mean(str(kind), kinds)}")
        if self.context_heads is not None and self.conditioning != "cross_attention":
            raise ConfigError(f"context_heads has no meaning for conditioning {self.conditioning!r}: leave it out")

    @property
    def grid(self) -> Grid:
        return Grid(self.sample_size[0] // self.patch_size, self.sample_size[1] // self.patch_size)


class DiT(Pretrained):
    """Patch tokens, a fixed position, a stack of conditioned blocks, and a linear head."""

    def __init__(self, c: DiTConfig) -> None:
        super().__init__()
        self.config = c
        self.embed = PatchEmbed(c.in_channels, c.hidden_size, c.patch_size)
        table = sincos_2d(*c.grid, c.hidden_size).to(torch.get_default_dtype())
        self.position = nn.Parameter(table[None], requires_grad=False)  # counted by the paper, never trained
        closed = c.timestep_frequencies == "closed"
        self.conditioning = Conditioning(c.hidden_size, c.num_classes, null_class=c.null_class, closed=closed)
        self.join_context = PrependContext() if c.conditioning == "in_context" else NoContext()
        self.blocks = nn.ModuleList(DiTBlock(c, Place(i, c.depth)) for i in range(c.depth))
        head_modulation = build_head_modulation(c.conditioning, c.hidden_size)
        self.head = Head(c.hidden_size, c.patch_size, c.out_channels, head_modulation)

    def forward(
        self,
        latents: Float[Tensor, "B C H W"],
        timesteps: Float[Tensor, "B"] | Int[Tensor, "B"],
        class_labels: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B O H W"]:
        """Predict from noisy latents.

        Args:
            latents: any size that the patch size divides; other sizes than `sample_size` get positions of their own.
            timesteps: what the schedule tells the network, 0 = clean.
            class_labels: None for an unconditional network; `num_classes` is the null class.

        Returns:
            C channels of prediction, then C of variance fraction if `learned_variance`.

        Raises:
            ValueError: channels, size, timesteps or labels do not fit the network.
        """
        grid = patch_grid(latents, self.config.in_channels, self.config.patch_size)
        check_timesteps(timesteps, latents)
        context = self.conditioning(timesteps, class_labels)  # (B, L, D): one token for time, one for class
        cond = context.sum(dim=1)
        x = self.embed(latents) + self._position_of(grid)
        x = self.join_context(x, context)
        for block in self.blocks:
            x = block(x, cond, context, grid)
        return self.head(x[:, -grid.tokens :], cond, grid)

    def iter_blocks(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    def _position_of(self, grid: Grid) -> Tensor:
        if grid == self.config.grid:
            return self.position
        if self.config.position == "table":
            raise ValueError(
                f"grid {tuple(grid)}: this network's position table came with its weights and fits only "
                f"{tuple(self.config.grid)}"
            )
        return sincos_2d(*grid, self.config.hidden_size).to(self.position)[None]


class DiTBlock(nn.Module):
    """Mixer, then MLP, each a conditioned residual branch; cross-attention stands between them where asked for."""

    def __init__(self, c: DiTConfig, place: Place) -> None:
        super().__init__()
        self.modulation = build_modulation(c.conditioning, c.hidden_size, branches=2)
        affine = not self.modulation.adaptive
        self.norm1, self.norm2 = Norm(c.hidden_size, affine=affine), Norm(c.hidden_size, affine=affine)
        self.mixer = build_mixer(c.mixer, c.hidden_size, place)
        self.context = _cross_attention(c) if c.conditioning == "cross_attention" else NoContext()
        self.mlp = MLP(c.hidden_size, c.mlp_ratio)

    def forward(
        self, x: Float[Tensor, "B N D"], cond: Float[Tensor, "B K"], context: Float[Tensor, "B L K"], grid: Grid
    ) -> Float[Tensor, "B N D"]:
        m1, m2 = self.modulation(cond)
        x = add_branch(x, self.mixer(self.norm1(x, m1), grid), m1)
        x = self.context(x, context)
        return add_branch(x, self.mlp(self.norm2(x, m2)), m2)

    def branches(self) -> tuple[nn.Module, ...]:
        return self.mixer, self.mlp


def _cross_attention(c: DiTConfig) -> CrossAttention:
    if c.context_heads is not None:
        return CrossAttention(c.hidden_size, c.context_heads)
    if isinstance(c.mixer, AttentionConfig):
        return CrossAttention(c.hidden_size, c.mixer.num_heads)
    raise ConfigError(f"mixer {c.mixer.kind!r} has no heads to copy: set context_heads for the cross-attention")
