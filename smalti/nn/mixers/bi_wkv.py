"""Bi-WKV: a mean of values whose weights decay with distance, behind a shift over the plane, gated per channel.

Source: Diffusion-RWKV, arXiv:2404.04478, sec. 3.2; Vision-RWKV, arXiv:2403.02308, sec. 3.2; initial values as released.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.nn.layers import Grid
from smalti.nn.mixers.base import ALONE, MixerConfig, Place
from smalti.ops import bi_wkv, bi_wkv_release, shift_mix, sigmoid_gate

WKVKind = Literal["paper", "release"]
InitKind = Literal["fancy", "local", "global"]


@dataclass(frozen=True, kw_only=True)
class BiWKVConfig(MixerConfig):
    """Settings of a Bi-WKV mixer; the defaults are those of the released networks, but with the published formula."""

    kind: ClassVar[str] = "bi_wkv"
    wkv: WKVKind = "paper"  # "release": the weights that the released kernel really gives, for released networks
    divide_bonus: bool = True  # by the number of tokens, as the decay; the printed formula divides the decay alone
    key_norm: bool = False  # a norm on the result of Bi-WKV
    shift: int = 1  # tokens to the neighbour; 0 = no shift
    shift_fraction: float = 0.25  # of the channels that come from each of the four neighbours
    init: InitKind = "fancy"

    def __post_init__(self) -> None:
        check_shift(self.shift, self.shift_fraction, self.init)
        if self.wkv not in get_args(WKVKind):
            raise ConfigError(f"unknown wkv {self.wkv!r}{did_you_mean(str(self.wkv), get_args(WKVKind))}")


class BiWKV(nn.Module):
    """Keys, values and gates, each from its own mixture of a token and its neighbours; no biases."""

    wide_parameters: ClassVar[tuple[str, ...]] = ("decay", "bonus")  # exponents, summed over the whole sequence

    def __init__(self, config: BiWKVConfig, hidden_size: int, place: Place = ALONE) -> None:
        super().__init__()
        self.divide_bonus = config.divide_bonus
        self.op = bi_wkv if config.wkv == "paper" else bi_wkv_release
        decay, bonus = initial_decay_and_bonus(hidden_size, place, config.init)
        self.decay, self.bonus = nn.Parameter(decay), nn.Parameter(bonus)
        shares = initial_shares(hidden_size, place, config.init)
        self.neighbours = build_shift(shares, config.shift, config.shift_fraction)
        self.key, self.value, self.gate, self.out = (plain_linear(hidden_size, hidden_size) for _ in range(4))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5) if config.key_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        for_key, for_value, for_gate = self.neighbours(x, grid)
        key, value = self.key(for_key), self.value(for_value)
        # Exponents are sums over all tokens: in half precision the decay would be off by a per cent across the plane.
        wide = torch.promote_types(key.dtype, torch.float32)
        decay = self.decay.to(wide) / x.shape[1]
        # PARITY: divided-bonus. The printed formula divides the decay alone.
        bonus = self.bonus.to(wide) / (x.shape[1] if self.divide_bonus else 1)
        mean = self.op(decay, bonus, key, value).to(value.dtype)
        return self.out(sigmoid_gate(self.gate(for_gate), self.norm(mean)))


class Neighbours(nn.Module):
    """Several mixtures of each token with what the quad shift brings it: share * own + (1 - share) * shifted.

    Tokens in front of the image have no neighbours: they are their own.
    """

    def __init__(self, shares: dict[str, Float[Tensor, "D"]], shift: int, fraction: float) -> None:
        super().__init__()
        self.shift, self.fraction, self.order = shift, fraction, tuple(shares)  # the module dict sorts its names
        self.shares = nn.ParameterDict({name: nn.Parameter(share[None, None]) for name, share in shares.items()})

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> tuple[Float[Tensor, "B N D"], ...]:
        front = x.shape[1] - grid.tokens
        if front < 0:
            raise ValueError(f"{x.shape[1]} tokens do not fill a grid of {grid.rows}x{grid.columns}")
        shares = torch.cat([self.shares[name][0] for name in self.order])  # (M, D)
        mixed = shift_mix(x[:, front:].unflatten(1, grid), shares, shift=self.shift, fraction=self.fraction)
        mixtures = mixed.flatten(2, 3).unbind(1)
        if torch.compiler.is_compiling():  # else the products become batched ones, with a copied weight for each item
            mixtures = tuple(m.contiguous() for m in mixtures)
        return tuple(torch.cat([x[:, :front].to(m.dtype), m], dim=1) for m in mixtures) if front else mixtures


class NoNeighbours(nn.Module):
    """For networks without a shift: every mixture is the token itself."""

    def __init__(self, mixtures: int) -> None:
        super().__init__()
        self.mixtures = mixtures

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> tuple[Float[Tensor, "B N D"], ...]:
        return (x,) * self.mixtures


def build_shift(shares: dict[str, Float[Tensor, "D"]], shift: int, fraction: float) -> Neighbours | NoNeighbours:
    """One mixture per share; without a shift there is nothing to mix, and no share is kept."""
    return Neighbours(shares, shift, fraction) if shift else NoNeighbours(len(shares))


def check_shift(shift: int, fraction: float, init: str) -> None:
    """Refuse settings that no shift has.

    Raises:
        ConfigError: a negative shift, groups that are empty or overlap, or initial values of an unknown kind.
    """
    if shift < 0 or not 0 < fraction <= 0.25:
        raise ConfigError(f"shift {shift} must be at least 0, and the fraction {fraction} of each group in (0, 0.25]")
    if init not in get_args(InitKind):
        raise ConfigError(f"unknown init {init!r}{did_you_mean(str(init), get_args(InitKind))}")


def plain_linear(inputs: int, outputs: int) -> nn.Linear:
    """Xavier-uniform and without a bias, as all products of the mixes are."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def initial_shares(hidden_size: int, place: Place, init: InitKind) -> dict[str, Float[Tensor, "D"]]:
    """How much of itself a token keeps at the start, for keys, values and gates.

    "fancy": from none to all over the channels, steeper in early layers; "local": all; "global": half.
    """
    if init != "fancy":
        share = torch.full((hidden_size,), 1.0 if init == "local" else 0.5)
        return {"key": share, "value": share.clone(), "gate": share.clone()}
    channel = torch.arange(hidden_size, dtype=torch.float64) / hidden_size
    down, up = 1 - place.layer / place.depth, _how_deep(place)
    shares = {"key": channel**down, "value": channel**down + 0.3 * up, "gate": channel ** (0.5 * down)}
    return {name: share.to(torch.get_default_dtype()) for name, share in shares.items()}


def initial_decay_and_bonus(
    hidden_size: int, place: Place, init: InitKind
) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"]]:
    """Decay over the whole sequence, and bonus of the token itself.

    "fancy": decays from -5 (far tokens weigh more) to 3, and a bonus around log 0.3 that differs from channel to
    channel; "local": both 1; "global": both 0, a mean of all tokens.
    """
    if init != "fancy":
        level = torch.full((hidden_size,), 1.0 if init == "local" else 0.0)
        return level, level.clone()
    channel = torch.arange(hidden_size, dtype=torch.float64)
    decay = -5 + 8 * (channel / max(hidden_size - 1, 1)) ** (0.7 + 1.3 * _how_deep(place))
    bonus = math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
    return decay.to(torch.get_default_dtype()), bonus.to(torch.get_default_dtype())


def _how_deep(place: Place) -> float:
    """0 for the first layer, 1 for the last."""
    return place.layer / max(place.depth - 1, 1)
