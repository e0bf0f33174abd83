"""U-DiT: a U-shaped transformer on three resolutions without patches, attention on downsampled tokens at all of them.

Source: Tian et al. 2024, arXiv:2405.02730, sec. 3 and appendix A; widths, conditions and the two layers of a block as
in the released code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.models.base import BackboneConfig, check_timesteps
from smalti.models.pretrained import Pretrained
from smalti.nn.conditioning import (
    Conditioning,
    ConditioningKind,
    add_branch,
    build_head_modulation,
    build_modulation,
)
from smalti.nn.layers import Grid, Norm
from smalti.nn.mixers import DownsampledAttention, DownsampledAttentionConfig, MixerConfig, Place, build_mixer
from smalti.nn.plane import Depthwise, Pointwise, as_plane, as_tokens, conv, depthwise, with_shortcut
from smalti.ops import gelu

MLPKind = Literal["reparameterized", "depthwise", "basic"]
_WIDTHS = (1, 2, 4, 2, 2)  # of the five stages, in hidden sizes; the released last one stays at two
_CONDITIONS = (0, 1, 2, 1, 1)  # which of the three conditions each stage is told


@dataclass(frozen=True, kw_only=True)
class UDiTConfig(BackboneConfig):
    """Settings of a U-DiT; the presets of the paper are in `smalti.presets.udit`.

    Args:
        hidden_size: width of the first stage; the others have 2, 4, 2 and 2 times as much.
        depth: blocks of the five stages, each of two transformer layers.
        mlp: reparameterized = the form that is trained, depthwise = what `fuse()` makes of it, also trainable,
            basic = two layers and no convolution.
    """

    kind: ClassVar[str] = "udit"
    hidden_size: int
    depth: tuple[int, int, int, int, int]
    mixer: MixerConfig
    mlp: MLPKind = "reparameterized"
    mlp_ratio: float = 2.0
    conditioning: ConditioningKind = "adaln_zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size < 2 or self.hidden_size % 2 or min(self.depth) < 0 or sum(self.depth) < 1:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be even and depth {list(self.depth)} five numbers of blocks, "
                "not all 0"
            )
        rows, columns = self.sample_size
        if rows % self.divisor or columns % self.divisor:
            raise ConfigError(
                f"latents of {rows}x{columns} cannot be halved as often as this network does: choose a sample_size "
                f"divisible by {self.divisor}"
            )
        if int(self.hidden_size * self.mlp_ratio) < 2:
            raise ConfigError(f"mlp_ratio {self.mlp_ratio} leaves no channels inside the MLP: the paper's is 2.0")
        for name, kinds in (("conditioning", get_args(ConditioningKind)), ("mlp", get_args(MLPKind))):
            if (kind := getattr(self, name)) not in kinds:
                raise ConfigError(f"unknown {name} {kind!r}{did_you_mean(str(kind), kinds)}")
        if self.conditioning not in ("adaln_zero", "adaln"):
            raise ConfigError(
                f"conditioning {self.conditioning!r}: a U-DiT halves its plane and is conditioned through its norms; "
                "choose from adaln_zero, adaln"
            )

    @property
    def label_tables(self) -> int:
        return 3

    @property
    def divisor(self) -> int:
        """Rows and columns of latents must be divisible by it: two halvings, and what the mixer needs at the lowest."""
        return 4 * (self.mixer.factor if isinstance(self.mixer, DownsampledAttentionConfig) else 1)


class UDiT(Pretrained):
    """Two stages down, one at the bottom, two up with long skips, a convolutional head; conditions of three widths."""

    def __init__(self, c: UDiTConfig) -> None:
        super().__init__()
        self.config = c
        h, layers = c.hidden_size, 2 * sum(c.depth)
        self.embed = conv(c.in_channels, h)
        nn.init.xavier_uniform_(self.embed.weight.view(h, -1))
        self.conditioning = nn.ModuleList(
            Conditioning(width, c.num_classes, null_class=c.null_class) for width in (h, 2 * h, 4 * h)
        )
        self.stages = nn.ModuleList()
        for i, (blocks, width) in enumerate(zip(c.depth, _WIDTHS, strict=True)):
            first = 2 * sum(c.depth[:i])
            places = [(Place(first + 2 * j, layers), Place(first + 2 * j + 1, layers)) for j in range(blocks)]
            self.stages.append(nn.ModuleList(UDiTBlock(c, width * h, pair) for pair in places))
        self.down = nn.ModuleList([conv(h, h // 2, bias=False), conv(2 * h, h, bias=False)])
        self.up = nn.ModuleList([conv(4 * h, 8 * h, bias=False), conv(2 * h, 4 * h, bias=False)])
        self.join = nn.ModuleList([Pointwise(4 * h, 2 * h), Pointwise(2 * h, 2 * h)])
        self.head = UDiTHead(2 * h, c.out_channels, build_head_modulation(c.conditioning, 2 * h))

    def forward(
        self,
        latents: Float[Tensor, "B C H W"],
        timesteps: Float[Tensor, "B"] | Int[Tensor, "B"],
        class_labels: Int[Tensor, "B"] | Int[Tensor, "B 3"] | None = None,
    ) -> Float[Tensor, "B O H W"]:
        """Predict from noisy latents.

        Args:
            latents: rows and columns divisible by `config.divisor`, 8 for the paper's mixer.
            timesteps: what the schedule tells the network, 0 = clean.
            class_labels: None for an unconditional network; `num_classes` is the null class. (B, 3) = a label for each
                of the three widths, which training with independent label dropout needs.

        Returns:
            C channels of prediction, then C of variance fraction if `learned_variance`.

        Raises:
            ValueError: channels, size, timesteps or labels do not fit the network.
        """
        grid = self._grid_of(latents)
        check_timesteps(timesteps, latents)
        conds = self._conditions(timesteps, class_labels)
        half, quarter = Grid(grid.rows // 2, grid.columns // 2), Grid(grid.rows // 4, grid.columns // 4)
        plane = latents.to(self.embed.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = as_tokens(self.embed(plane))  # (B, N, h)
        skip1 = self._stage(0, x, conds, grid)
        x = as_tokens(F.pixel_unshuffle(self.down[0](as_plane(skip1, grid)), 2))  # (B, N/4, 2 h)
        skip2 = self._stage(1, x, conds, half)
        x = as_tokens(F.pixel_unshuffle(self.down[1](as_plane(skip2, half)), 2))  # (B, N/16, 4 h)
        x = self._stage(2, x, conds, quarter)
        x = as_tokens(F.pixel_shuffle(self.up[0](as_plane(x, quarter)), 2))  # (B, N/4, 2 h)
        x = self._stage(3, self.join[0](torch.cat([x, skip2], dim=-1)), conds, half)
        x = as_tokens(F.pixel_shuffle(self.up[1](as_plane(x, half)), 2))  # (B, N, h)
        x = self._stage(4, self.join[1](torch.cat([x, skip1], dim=-1)), conds, grid)  # (B, N, 2 h)
        return self.head(x, conds[1], grid)

    def iter_blocks(self) -> Iterator[nn.Module]:
        return (block for stage in self.stages for block in stage)  # type: ignore[attr-defined]

    def fuse(self) -> "UDiT":
        """A new network for inference that computes the same with fewer parameters; this one is left as it is.

        The parallel convolutions and the layer pairs of each MLP become one each, shortcuts go into the kernels. The
        result is an ordinary U-DiT, which can be saved, loaded and called like any; training it is another model than
        training this one. Outputs agree to rounding.

        Source: arXiv:2405.02730, sec. 3.4; the published parameters and GMACs are those of the fused network.
        """
        c, state = self.config, self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, ReparameterizedMLP):
                for key in module.state_dict():
                    del state[f"{name}.{key}"]
                state |= {f"{name}.{key}": tensor for key, tensor in module.fused().items()}
            if isinstance(module, DownsampledAttention):
                state[f"{name}.depthwise.weight"] = module.kernel()
        if isinstance(mixer := c.mixer, DownsampledAttentionConfig):
            mixer = replace(mixer, shortcut=False)
        with torch.device("meta"):
            network = UDiT(replace(c, mixer=mixer, mlp="depthwise" if c.mlp == "reparameterized" else c.mlp))
        network.load_state_dict({k: t.detach().clone() for k, t in state.items()}, strict=True, assign=True)
        network.stored_with = self.stored_with
        return network.train(self.training)

    def _stage(self, i: int, x: Tensor, conds: list[Tensor], grid: Grid) -> Tensor:
        for block in cast(nn.ModuleList, self.stages[i]):
            x = block(x, conds[_CONDITIONS[i]], grid)
        return x

    def _conditions(self, timesteps: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """One vector of each width per image."""
        labels: tuple[Tensor | None, ...] = (class_labels,) * 3
        if class_labels is not None and class_labels.ndim == 2:
            if class_labels.shape != (len(timesteps), 3):
                raise ValueError(
                    f"class_labels of shape {tuple(class_labels.shape)}: expected one per image or three, "
                    f"({len(timesteps)},) or ({len(timesteps)}, 3)"
                )
            labels = class_labels.unbind(1)
        pairs = zip(self.conditioning, labels, strict=True)
        return [conditioning(timesteps, label).sum(dim=1) for conditioning, label in pairs]

    def _grid_of(self, latents: Tensor) -> Grid:
        c, d = self.config, self.config.divisor
        if latents.ndim != 4 or latents.shape[1] != c.in_channels or latents.shape[2] % d or latents.shape[3] % d:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: expected (B, {c.in_channels}, H, W) "
                f"with H and W divisible by {d}"
            )
        return Grid(latents.shape[2], latents.shape[3])


class UDiTBlock(nn.Module):
    """Two transformer layers; the paper's depths count such blocks."""

    def __init__(self, c: UDiTConfig, hidden_size: int, places: tuple[Place, Place]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(UDiTLayer(c, hidden_size, place) for place in places)

    def forward(self, x: Float[Tensor, "B N D"], cond: Float[Tensor, "B K"], grid: Grid) -> Float[Tensor, "B N D"]:
        for layer in self.layers:
            x = layer(x, cond, grid)
        return x

    def branches(self) -> tuple[nn.Module, ...]:
        return tuple(branch for layer in self.layers for branch in (layer.mixer, layer.mlp))  # type: ignore[misc]


class UDiTLayer(nn.Module):
    """Mixer, then MLP, each a conditioned residual branch."""

    def __init__(self, c: UDiTConfig, hidden_size: int, place: Place) -> None:
        super().__init__()
        self.modulation = build_modulation(c.conditioning, hidden_size, branches=2)
        self.norm1, self.norm2 = Norm(hidden_size), Norm(hidden_size)
        self.mixer = build_mixer(c.mixer, hidden_size, place)
        self.mlp = MLPS[c.mlp](hidden_size, int(hidden_size * c.mlp_ratio))

    def forward(self, x: Float[Tensor, "B N D"], cond: Float[Tensor, "B K"], grid: Grid) -> Float[Tensor, "B N D"]:
        m1, m2 = self.modulation(cond)
        x = add_branch(x, self.mixer(self.norm1(x, m1), grid), m1)
        return add_branch(x, self.mlp(self.norm2(x, m2), grid), m2)


class ReparameterizedMLP(nn.Module):
    """Two linear layers, GELU, three depthwise convolutions and a shortcut side by side, two linear layers.

    Nothing stands between what is side by side or in a row but sums, so each group is one kernel. They are multiplied
    in every forward, gradients go through, and the weights stay as they are.
    """

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.in1, self.in2 = Pointwise(hidden_size, inner // 2), Pointwise(inner // 2, inner)
        self.depthwise5, self.depthwise3, self.depthwise1 = (Depthwise(inner, size) for size in (5, 3, 1))
        self.out1, self.out2 = Pointwise(inner, hidden_size), Pointwise(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        x = F.gelu(_in_a_row(x, self.in1, self.in2))
        return _in_a_row(depthwise(x, grid, *self._side_by_side()), self.out1, self.out2)

    def fused(self) -> dict[str, Tensor]:
        """The tensors of the `DepthwiseMLP` that computes the same; multiplied in float64, so rounded once."""
        with torch.device("meta"):
            exact = ReparameterizedMLP(self.in1.weight.shape[1], self.in2.weight.shape[0])
        exact.load_state_dict({k: t.detach().double() for k, t in self.state_dict().items()}, strict=True, assign=True)
        groups = {
            "expand": _product(exact.in1, exact.in2),
            "depthwise": exact._side_by_side(),
            "contract": _product(exact.out1, exact.out2),
        }
        found = {}
        for name, (weight, bias) in groups.items():
            found[f"{name}.weight"] = weight.to(self.in1.weight.dtype).view(*weight.shape, *[1] * (4 - weight.ndim))
            found[f"{name}.bias"] = bias.to(self.in1.weight.dtype)
        return found

    def _side_by_side(self) -> tuple[Tensor, Tensor]:
        d5, d3, d1 = self.depthwise5, self.depthwise3, self.depthwise1
        weight = with_shortcut(d5.weight + F.pad(d3.weight, (1,) * 4) + F.pad(d1.weight, (2,) * 4))
        return weight, d5.bias + d3.bias + d1.bias


class DepthwiseMLP(nn.Module):
    """Linear layer, GELU, a 5x5 depthwise convolution, linear layer."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.expand, self.contract = Pointwise(hidden_size, inner), Pointwise(inner, hidden_size)
        self.depthwise = Depthwise(inner, 5)

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        return self.contract(self.depthwise(F.gelu(self.expand(x)), grid))


class BasicMLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them, on each token alone."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Pointwise(hidden_size, inner), Pointwise(inner, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


MLPS: dict[str, type[nn.Module]] = {
    "reparameterized": ReparameterizedMLP,
    "depthwise": DepthwiseMLP,
    "basic": BasicMLP,
}


class UDiTHead(nn.Module):
    """Tokens to latents: convolution, modulated norm, and a convolution that starts at zero."""

    def __init__(self, hidden_size: int, out_channels: int, modulation: nn.Module) -> None:
        super().__init__()
        self.conv = conv(hidden_size, hidden_size)
        self.norm, self.modulation = Norm(hidden_size), modulation
        self.out = conv(hidden_size, out_channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Float[Tensor, "B N D"], cond: Float[Tensor, "B K"], grid: Grid) -> Float[Tensor, "B O H W"]:
        (m,) = self.modulation(cond)
        x = self.norm(as_tokens(self.conv(as_plane(x, grid))), m)
        return self.out(as_plane(x, grid)).contiguous()


def _product(first: Pointwise, second: Pointwise) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias of both in a row."""
    weight = second.weight.flatten(1)
    return weight @ first.weight.flatten(1), torch.addmv(second.bias, weight, first.bias)


def _in_a_row(x: Float[Tensor, "B N I"], first: Pointwise, second: Pointwise) -> Float[Tensor, "B N O"]:
    """Both layers; as one where multiplying their weights costs less than it saves, which takes enough tokens."""
    (outputs, between), inputs = second.weight.shape[:2], first.weight.shape[1]
    tokens = x.shape[0] * x.shape[1]
    if outputs * between * inputs + tokens * outputs * inputs < tokens * between * (outputs + inputs):
        return F.linear(x, *_product(first, second))
    return second(first(x))
