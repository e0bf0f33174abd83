"""DiffuSSM: pixels of the latent plane as one long sequence, a state space instead of attention, hourglasses around it.

Source: Yan et al. 2023, arXiv:2311.18257, sec. 3 and fig. 2. No code was released; where the paper leaves a choice, the
defaults are those with which the network has the published 673 M parameters, and the others are settings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.models.base import BackboneConfig, check_patches, check_timesteps
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
from smalti.nn.embeddings import PatchEmbed, patchify, sincos_2d
from smalti.nn.layers import Grid, Head, Norm, linear
from smalti.nn.mixers import BiSSMConfig, MixerConfig, Place, build_mixer
from smalti.ops import gelu_product

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}
_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": gelu_product,
    "silu": lambda a, b: F.silu(a) * F.silu(b),
}


@dataclass(frozen=True, kw_only=True)
class DiffuSSMConfig(BackboneConfig):
    """Settings of a DiffuSSM; the presets are in `smalti.presets.diffussm`.

    Args:
        hourglass: M, how many neighbouring tokens the dense layers see as one; it must divide the number of tokens.
        patch_size: 1 = every latent pixel is a token; the paper also measures 2.
        activation: the paper's sigma, which it does not name.
        stream: the residual stream has all tokens ("full", the figure) or one for M of them ("short", the equations).
        pooling: M tokens become one by their "mean", or by a "learned" layer of M D^2 weights.
        upscale: one token becomes M by "repeat", or by a "learned" layer of M D^2 weights.
        gather: M outputs of the mixer become one of width 2 D ("2d", each gives 2 D / M) or of width M D ("md", each
            gives D). For M = 2 the two are the same; else the dense layers have (11 + M) D^2 or (5 + 4 M) D^2 weights.
        context_heads: heads of the cross-attention, which the state space has none to copy from.
        position: the state space is positional by itself; "sincos_2d" adds DiT's fixed vectors.
    """

    kind: ClassVar[str] = "diffussm"
    hidden_size: int
    depth: int
    mixer: MixerConfig = field(default_factory=BiSSMConfig)
    hourglass: int = 2
    patch_size: int = 1
    activation: Literal["gelu", "silu"] = "gelu"
    stream: Literal["full", "short"] = "full"
    pooling: Literal["mean", "learned"] = "mean"
    upscale: Literal["repeat", "learned"] = "repeat"
    gather: Literal["2d", "md"] = "2d"
    conditioning: ConditioningKind = "adaln_zero"
    context_heads: int | None = None
    position: Literal["none", "sincos_2d"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patches(self.sample_size, self.patch_size)
        if self.hourglass < 1 or self.grid.tokens % self.hourglass:
            raise ConfigError(
                f"{self.grid.tokens} tokens are not divisible by hourglass {self.hourglass}: "
                "choose an hourglass that divides rows times columns"
            )
        if self.hidden_size < 4 or self.hidden_size % 4 or self.depth < 1:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and depth {self.depth} at least 1"
            )
        if self.gather == "2d" and 2 * self.hidden_size % self.hourglass:
            raise ConfigError(
                f"twice the hidden_size {self.hidden_size} is not divisible by hourglass {self.hourglass}: "
                "choose gather='md' or another hourglass"
            )
        for name, known in (
            ("activation", tuple(_ACTIVATIONS)),
            ("stream", ("full", "short")),
            ("pooling", ("mean", "learned")),
            ("upscale", ("repeat", "learned")),
            ("gather", ("2d", "md")),
            ("conditioning", get_args(ConditioningKind)),
            ("position", ("none", "sincos_2d")),
        ):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"unknown {name} {value!r}{did_you_mean(str(value), known)}")
        if self.stream == "short" and (self.pooling, self.upscale) != ("mean", "repeat"):
            raise ConfigError("a short stream is neither pooled nor upscaled: leave pooling and upscale out")
        if (self.context_heads is None) == (self.conditioning == "cross_attention"):
            raise ConfigError(
                f"context_heads {self.context_heads} with conditioning {self.conditioning!r}: "
                "set it for 'cross_attention', and leave it out for the others"
            )

    @property
    def grid(self) -> Grid:
        return Grid(self.sample_size[0] // self.patch_size, self.sample_size[1] // self.patch_size)


class DiffuSSM(Pretrained):
    """Pixel tokens, row by row, a stack of conditioned blocks, and a linear head."""

    def __init__(self, c: DiffuSSMConfig) -> None:
        super().__init__()
        self.config = c
        short = c.hourglass if c.stream == "short" else 1  # tokens of the plane in one token of the stream
        if short > 1:
            self.embed: nn.Module = RunEmbed(c.in_channels, c.hidden_size, c.patch_size, short)
        else:
            self.embed = PatchEmbed(c.in_channels, c.hidden_size, c.patch_size)
        self.conditioning = Conditioning(c.hidden_size, c.num_classes, null_class=c.null_class)
        self.join_context = PrependContext() if c.conditioning == "in_context" else NoContext()
        self.blocks = nn.ModuleList(DiffuSSMBlock(c, Place(i, c.depth)) for i in range(c.depth))
        # A token of a short stream ends as `short` tokens of the plane, one behind the other in its channels, which is
        # how the head lays them out anyway.
        self.head = Head(
            c.hidden_size, c.patch_size, short * c.out_channels, build_head_modulation(c.conditioning, c.hidden_size)
        )

    def forward(
        self,
        latents: Float[Tensor, "B C H W"],
        timesteps: Float[Tensor, "B"] | Int[Tensor, "B"],
        class_labels: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B O H W"]:
        """Predict from noisy latents.

        Args:
            latents: any size that the patch size divides and whose tokens the hourglass divides.
            timesteps: what the schedule tells the network, 0 = clean.
            class_labels: None for an unconditional network; `num_classes` is the null class.

        Returns:
            C channels of prediction, then C of variance fraction if `learned_variance`.

        Raises:
            ValueError: channels, size, timesteps or labels do not fit the network.
        """
        c, grid = self.config, self._grid_of(latents)
        check_timesteps(timesteps, latents)
        context = self.conditioning(timesteps, class_labels)  # (B, T, D): one token for time, one for class
        cond = context.sum(dim=1)
        x = self.embed(latents)  # (B, J M, D), or (B, J, D) for a short stream
        if c.position == "sincos_2d":
            position = sincos_2d(*grid, c.hidden_size).to(x)
            x = x + position.unflatten(0, (x.shape[1], -1)).mean(dim=1)
        # In context, each token of conditioning fills an hourglass of its own.
        x = self.join_context(x, context.repeat_interleave(c.hourglass if c.stream == "full" else 1, dim=1))
        for block in self.blocks:
            x = block(x, cond, context, grid)
        return self.head(x[:, -(grid.tokens // (c.hourglass if c.stream == "short" else 1)) :], cond, grid)

    def iter_blocks(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    def _grid_of(self, latents: Tensor) -> Grid:
        c, p = self.config, self.config.patch_size
        fits = latents.ndim == 4 and latents.shape[1] == c.in_channels
        if not fits or latents.shape[2] % p or latents.shape[3] % p or latents[0, 0].numel() // p**2 % c.hourglass:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: expected (B, {c.in_channels}, H, W) with H and W divisible "
                f"by the patch size {p} and the number of patches divisible by hourglass {c.hourglass}"
            )
        return Grid(latents.shape[2] // p, latents.shape[3] // p)


class RunEmbed(nn.Module):
    """Patches of a row, M at a time, as one token: the input of a short stream."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int, run: int) -> None:
        super().__init__()
        self.patch_size, self.run = patch_size, run
        self.proj = linear(run * in_channels * patch_size**2, hidden_size)

    def forward(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B J D"]:
        patches = patchify(latents.to(self.proj.weight.dtype), self.patch_size)
        return self.proj(patches.unflatten(1, (-1, self.run)).flatten(2))


class DiffuSSMBlock(nn.Module):
    """One residual branch: shorten, dense, all tokens again, mixer, and down once more to be fused with its input."""

    def __init__(self, c: DiffuSSMConfig, place: Place) -> None:
        super().__init__()
        self.modulation = build_modulation(c.conditioning, c.hidden_size, branches=1)
        self.norm = Norm(c.hidden_size, affine=not self.modulation.adaptive)
        self.context = NoContext() if c.context_heads is None else CrossAttention(c.hidden_size, c.context_heads)
        self.shorten = Shorten(c)
        self.dense = HourglassDense(c)
        self.mixer = build_mixer(c.mixer, c.hidden_size, place)
        self.fusion = HourglassFusion(c)

    def forward(
        self, x: Float[Tensor, "B N D"], cond: Float[Tensor, "B K"], context: Float[Tensor, "B T K"], grid: Grid
    ) -> Float[Tensor, "B N D"]:
        x = self.context(x, context)
        (m,) = self.modulation(cond)
        short = self.shorten(self.norm(x, m))  # (B, J, D)
        mixed = self.mixer(self.dense(short), grid)  # (B, J M, D)
        return add_branch(x, self.fusion(short, mixed), m)

    def branches(self) -> tuple[nn.Module, ...]:
        return (self.fusion,)


class Shorten(nn.Module):
    """The hourglass's down-scale: M neighbouring tokens of the stream as one."""

    def __init__(self, c: DiffuSSMConfig) -> None:
        super().__init__()
        self.run = c.hourglass if c.stream == "full" else 1
        learned = c.pooling == "learned"
        self.pool = linear(self.run * c.hidden_size, c.hidden_size) if learned else None

    def forward(self, h: Float[Tensor, "B N D"]) -> Float[Tensor, "B J D"]:
        runs = h.unflatten(1, (-1, self.run))
        if self.pool is not None:
            return self.pool(runs.flatten(2))
        if self.run == 2:
            first, second = runs.unbind(2)
            return torch.lerp(first, second, 0.5)  # their mean, in a third of the time that `mean` takes
        return runs.mean(dim=2) if self.run > 1 else h


class HourglassDense(nn.Module):
    """From one token to M: U_{jM+k} = act(W_up^k act(W_0 I_j))."""

    def __init__(self, c: DiffuSSMConfig) -> None:
        super().__init__()
        self.run, self.activation = c.hourglass, _ACTIVATIONS[c.activation]
        self.fc = linear(c.hidden_size, c.hidden_size)
        self.up = nn.Linear(c.hidden_size, c.hourglass * c.hidden_size)
        for place in self.up.weight.chunk(c.hourglass):  # each token of the run has a layer of its own
            nn.init.xavier_uniform_(place)
        nn.init.zeros_(self.up.bias)

    def forward(self, short: Float[Tensor, "B J D"]) -> Float[Tensor, "B N D"]:
        u = self.activation(self.up(self.activation(self.fc(short))))  # (B, J, M D)
        return u.unflatten(2, (self.run, -1)).flatten(1, 2)


class HourglassFusion(nn.Module):
    """From M tokens to one, times what went in, and up to the stream again.

    O_j = W_3 (act(W_2 act(concat_k W_dn^k Y_{jM+k})) act(W_1 I_j)). The M layers W_dn^k are one list, because each sees
    one token of a run and writes one part of the wide token.
    """

    def __init__(self, c: DiffuSSMConfig) -> None:
        super().__init__()
        self.run, self.activation, d = c.hourglass, c.activation, c.hidden_size
        part = 2 * d // c.hourglass if c.gather == "2d" else d
        self.down = nn.ModuleList(linear(d, part) for _ in range(c.hourglass))
        self.own = linear(d, 2 * d)
        self.gathered = linear(c.hourglass * part, 2 * d)
        self.out = linear(2 * d, d)
        self.stream_run = c.hourglass if c.stream == "full" else 1
        self.up = linear(d, self.stream_run * d) if c.upscale == "learned" else None

    def forward(self, short: Float[Tensor, "B J D"], mixed: Float[Tensor, "B N D"]) -> Float[Tensor, "B S D"]:
        runs = mixed.unflatten(1, (-1, self.run)).unbind(2)
        gathered = torch.cat([down(y) for down, y in zip(self.down, runs, strict=True)], dim=-1)
        gathered = self.gathered(_ACTIVATIONS[self.activation](gathered))
        fused = self.out(_PRODUCTS[self.activation](gathered, self.own(short)))  # (B, J, D)
        if self.up is not None:
            return self.up(fused).unflatten(2, (self.stream_run, -1)).flatten(1, 2)
        # Not repeat_interleave, whose gradient is slow.
        return torch.stack([fused] * self.stream_run, dim=2).flatten(1, 2) if self.stream_run > 1 else fused
