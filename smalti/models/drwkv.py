"""Diffusion-RWKV: Bi-WKV and channel mix over patch tokens, with long skips from the first half to the second.

Source: Fei et al. 2024, arXiv:2404.04478, sec. 3; what the paper leaves open is as in the released networks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
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
    NoContext,
    PrependContext,
    add_branch,
    build_head_modulation,
    build_modulation,
)
from smalti.nn.embeddings import PatchEmbed, sincos_2d
from smalti.nn.layers import Grid, Head, Norm, linear
from smalti.nn.mixers import BiWKVConfig, MixerConfig, Place, build_mixer
from smalti.nn.mixers.bi_wkv import InitKind, build_shift, check_shift, initial_shares, plain_linear
from smalti.ops import sigmoid_gate, squared_relu

DRWKVConditioning = Literal["adaln_zero", "adaln", "in_context"]
SkipKind = Literal["concat", "add", "none"]
TableKind = Literal["trained", "frozen"]


@dataclass(frozen=True, kw_only=True)
class DRWKVConfig(BackboneConfig):
    """Settings of a Diffusion-RWKV; the presets of the paper are in `smalti.presets.drwkv`."""

    kind: ClassVar[str] = "drwkv"
    hidden_size: int
    depth: int  # odd: as many blocks before the middle one as behind it
    mixer: MixerConfig = field(default_factory=BiWKVConfig)
    patch_size: int = 2
    mlp_ratio: float = 4.0
    mlp_shift: int = 1  # of the channel mix, in tokens; 0 = none. The mixer has its own
    mlp_shift_fraction: float = 0.25
    mlp_key_norm: bool = False
    mlp_init: InitKind = "fancy"
    conditioning: DRWKVConditioning = "adaln_zero"
    skip: SkipKind = "concat"
    post_norm: bool = False  # norms behind the mixes, not before them
    norm_affine: bool = True  # norms that are modulated have a scale and a shift of their own too
    position: TableKind = "trained"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patches(self.sample_size, self.patch_size)
        if self.hidden_size < 4 or self.hidden_size % 4 or self.depth < 1 or self.depth % 2 == 0:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 4, and depth {self.depth} odd, because each "
                "block before the middle one has its partner behind it"
            )
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ConfigError(f"mlp_ratio {self.mlp_ratio} leaves no channels inside the channel mix: the paper's is 4")
        check_shift(self.mlp_shift, self.mlp_shift_fraction, self.mlp_init)
        for name, kinds in (("conditioning", DRWKVConditioning), ("skip", SkipKind), ("position", TableKind)):
            if (kind := getattr(self, name)) not in get_args(kinds):
                raise ConfigError(f"unknown {name} {kind!r}{did_you_mean(str(kind), get_args(kinds))}")

    @property
    def grid(self) -> Grid:
        return Grid(self.sample_size[0] // self.patch_size, self.sample_size[1] // self.patch_size)


class DRWKV(Pretrained):
    """Patch tokens, a position table, blocks in pairs around one in the middle, and two norms before the head."""

    def __init__(self, c: DRWKVConfig) -> None:
        super().__init__()
        self.config = c
        self.embed = PatchEmbed(c.in_channels, c.hidden_size, c.patch_size)
        table = sincos_2d(*c.grid, c.hidden_size).to(torch.get_default_dtype())
        self.position = nn.Parameter(table[None], requires_grad=c.position == "trained")
        self.conditioning = Conditioning(c.hidden_size, c.num_classes, null_class=c.null_class)
        self.join_context = PrependContext() if c.conditioning == "in_context" else NoContext()
        half = c.depth // 2
        places = [Place(i, c.depth) for i in range(c.depth)]
        self.in_blocks = nn.ModuleList(DRWKVBlock(c, place, "none") for place in places[:half])
        self.mid_blocks = nn.ModuleList([DRWKVBlock(c, places[half], "none")])
        self.out_blocks = nn.ModuleList(DRWKVBlock(c, place, c.skip) for place in places[half + 1 :])
        # PARITY: norm-before-head. One norm more than the figure shows; the head has its own behind it.
        self.norm = nn.LayerNorm(c.hidden_size, eps=1e-5)
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
            latents: any size that the patch size divides; for other sizes than `sample_size` a trained position table
                is stretched, and a frozen one computed anew.
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
        x = self.join_context(self.embed(latents) + self._position_of(grid), context)
        skips = []
        for block in self.in_blocks:
            x = block(x, cond, grid)
            skips.append(x)
        for block in self.mid_blocks:
            x = block(x, cond, grid)
        for block in self.out_blocks:
            x = block(x, cond, grid, skips.pop())
        return self.head(self.norm(x[:, -grid.tokens :]), cond, grid)

    def iter_blocks(self) -> Iterator[nn.Module]:
        return iter([*self.in_blocks, *self.mid_blocks, *self.out_blocks])

    def _position_of(self, grid: Grid) -> Tensor:
        if grid == self.config.grid:
            return self.position
        if self.config.position == "frozen":
            return sincos_2d(*grid, self.config.hidden_size).to(self.position)[None]
        table = self.position.unflatten(1, self.config.grid)  # (1, rows, columns, D)
        rows, columns = (stretch(old, new).to(table) for old, new in zip(self.config.grid, grid, strict=True))
        return torch.einsum("Rr,Cc,brcd->bRCd", rows, columns, table).flatten(1, 2)


class DRWKVBlock(nn.Module):
    """Mixer, then channel mix, each a conditioned residual branch; a block of the second half first joins its skip."""

    def __init__(self, c: DRWKVConfig, place: Place, skip: SkipKind) -> None:
        super().__init__()
        self.join = _build_join(skip, c.hidden_size)
        self.modulation = build_modulation(c.conditioning, c.hidden_size, branches=2)
        self.first_norm = nn.LayerNorm(c.hidden_size, eps=1e-5) if place.layer == 0 else nn.Identity()
        affine = c.norm_affine or not self.modulation.adaptive
        self.norm1, self.norm2 = (Norm(c.hidden_size, eps=1e-5, affine=affine) for _ in range(2))
        self.post_norm = c.post_norm
        self.mixer = build_mixer(c.mixer, c.hidden_size, place)
        self.mlp = ChannelMix(c, place)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        cond: Float[Tensor, "B K"],
        grid: Grid,
        skip: Float[Tensor, "B N D"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        x = self.first_norm(self.join(x, skip))
        m1, m2 = self.modulation(cond)
        if self.post_norm:
            # PARITY: post-norm-told. The modulation comes behind the norm here too, on what the mix gives.
            x = add_branch(x, self.norm1(self.mixer(x, grid), m1), m1)
            return add_branch(x, self.norm2(self.mlp(x, grid), m2), m2)
        x = add_branch(x, self.mixer(self.norm1(x, m1), grid), m1)
        return add_branch(x, self.mlp(self.norm2(x, m2), grid), m2)

    def branches(self) -> tuple[nn.Module, ...]:
        return (self.norm1, self.norm2) if self.post_norm else (self.mixer, self.mlp)


class ChannelMix(nn.Module):
    """Squared ReLU between two products, gated by a third; each sees a mixture of a token and its neighbours."""

    def __init__(self, c: DRWKVConfig, place: Place) -> None:
        super().__init__()
        inner = int(c.hidden_size * c.mlp_ratio)
        shares = initial_shares(c.hidden_size, place, c.mlp_init)
        start = {"key": shares["key"], "gate": shares["key"].clone()}  # unlike the mixer's gate
        self.neighbours = build_shift(start, c.mlp_shift, c.mlp_shift_fraction)
        self.key, self.value = plain_linear(c.hidden_size, inner), plain_linear(inner, c.hidden_size)
        self.gate = plain_linear(c.hidden_size, c.hidden_size)
        self.norm = nn.LayerNorm(inner, eps=1e-5) if c.mlp_key_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        for_key, for_gate = self.neighbours(x, grid)
        inner = self.norm(squared_relu(self.key(for_key)))
        return sigmoid_gate(self.gate(for_gate), self.value(inner))


class ConcatSkip(nn.Module):
    """Tokens and those of the partner block, side by side, through one linear layer."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = linear(2 * hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], skip: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.linear(torch.cat([x, skip], dim=-1))


class AddSkip(nn.Module):
    """The sum of both."""

    def forward(self, x: Float[Tensor, "B N D"], skip: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return x + skip


class NoSkip(nn.Module):
    """For blocks before the second half, and for networks without long skips."""

    def forward(self, x: Float[Tensor, "B N D"], skip: Float[Tensor, "B N D"] | None) -> Float[Tensor, "B N D"]:
        return x


def _build_join(skip: SkipKind, hidden_size: int) -> nn.Module:
    return ConcatSkip(hidden_size) if skip == "concat" else AddSkip() if skip == "add" else NoSkip()


def stretch(old: int, new: int) -> Float[Tensor, "new old"]:
    """Weights, float64, that read a line of `old` values at the centres of `new` cells over the same length.

    Linear between the two nearest values, the outermost ones held beyond their centres. A product with it is repeatable
    on every device, which PyTorch's own resampling is not in its backward.
    """
    at = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    distance = (at[:, None] - torch.arange(old, dtype=torch.float64)).abs()
    return (1 - distance).clamp(min=0)
