"""How a network hears of the noise level and the class: embeddings, adaLN, adaLN-Zero, cross-attention.

Conditioning is parts, not a switch. A block asks its modulation part for one `Modulation` per branch (or None, when
the conditioning does not work through the norms) and calls its context part (which may do nothing). `cond` is for the
modulation part alone: (B, D), or, in an inference form, (B, K) with what all modulation parts would make of it.

Source: Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2 and fig. 3.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.nn.embeddings import TimestepEmbedding
from smalti.ops import attention, gated_add

ConditioningKind = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]


class Modulation(NamedTuple):
    """What one residual branch is told: `x (1 + scale) + shift` on its normed input, `gate` on its output."""

    shift: Float[Tensor, "B 1 D"]
    scale: Float[Tensor, "B 1 D"]
    gate: Float[Tensor, "B 1 D"] | None


def add_branch(
    x: Float[Tensor, "B N D"], branch: Float[Tensor, "B N D"], m: Modulation | None
) -> Float[Tensor, "B N D"]:
    """The residual sum, gated where the modulation has a gate."""
    return x + branch if m is None or m.gate is None else gated_add(x, m.gate, branch)


class AdaLN(nn.Module):
    """Shift and scale for each branch, and a gate when `gated`, by one linear layer on SiLU(cond).

    `zero` makes the layer start at zero: with gates this is adaLN-Zero, whose block starts as the identity.
    """

    adaptive = True

    def __init__(self, hidden_size: int, branches: int, *, gated: bool, zero: bool) -> None:
        super().__init__()
        self.branches, self.parts = branches, 3 if gated else 2
        self.linear = nn.Linear(hidden_size, branches * self.parts * hidden_size)
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.linear.weight) if zero else nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, cond: Float[Tensor, "B D"]) -> tuple[Modulation, ...]:
        return split_modulation(self.linear(F.silu(cond)), self.branches, self.parts)


def split_modulation(told: Float[Tensor, "B K"], branches: int, parts: int) -> tuple[Modulation, ...]:
    """Shift, scale and, as a third part, gate of each branch, which stand one behind the other."""
    chunks = told.unsqueeze(1).chunk(branches * parts, dim=-1)
    rows = (chunks[i : i + parts] for i in range(0, len(chunks), parts))
    return tuple(Modulation(row[0], row[1], row[2] if parts == 3 else None) for row in rows)


class NoModulation(nn.Module):
    """For conditioning that does not work through the norms."""

    adaptive = False

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, cond: Float[Tensor, "B K"]) -> tuple[None, ...]:
        return (None,) * self.branches


class CrossAttention(nn.Module):
    """One more residual branch: tokens ask, the context (one token for time, one for class) answers."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ConfigError(f"hidden_size {hidden_size} cannot be split into {num_heads} heads of cross-attention")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(hidden_size, hidden_size) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L D"]) -> Float[Tensor, "B N D"]:
        heads = lambda t: t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # noqa: E731  (B, heads, N, D/heads)
        q, k, v = heads(self.query(self.norm(x))), heads(self.key(context)), heads(self.value(context))
        return x + self.out(attention(q, k, v).transpose(1, 2).flatten(2))


class NoContext(nn.Module):
    """For blocks without cross-attention."""

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L K"]) -> Float[Tensor, "B N D"]:
        return x


class PrependContext(nn.Module):
    """In-context conditioning: the context joins the sequence, before the image tokens and without a position.

    Attention does not care where it stands; Bi-WKV and state spaces do, and Diffusion-RWKV's figure puts it in front.
    """

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L D"]) -> Float[Tensor, "B M D"]:
        return torch.cat([context.to(x.dtype), x], dim=1)


def build_modulation(kind: ConditioningKind, hidden_size: int, branches: int) -> AdaLN | NoModulation:
    """The modulation part of a block."""
    if kind == "adaln_zero":
        return AdaLN(hidden_size, branches, gated=True, zero=True)
    if kind == "adaln":
        return AdaLN(hidden_size, branches, gated=False, zero=False)
    return NoModulation(branches)


def build_head_modulation(kind: ConditioningKind, hidden_size: int) -> AdaLN | NoModulation:
    """The modulation of the last norm: shift and scale for both adaLN forms, zero at the start for adaLN-Zero."""
    if kind in ("adaln_zero", "adaln"):
        return AdaLN(hidden_size, 1, gated=False, zero=kind == "adaln_zero")
    return NoModulation(1)


class Conditioning(nn.Module):
    """Timesteps and class labels as one vector each. Row `num_classes` of the label table is the null class.

    Args:
        num_classes: 0 = unconditional, no label table.
        null_class: whether the table has the row that label dropout and guidance need.
        closed: frequencies of the timestep embedding as in diffusers, see `timestep_sinusoid`.
    """

    def __init__(self, hidden_size: int, num_classes: int, *, null_class: bool = True, closed: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.num_classes, self.null_class = hidden_size, num_classes, null_class
        self.timestep = TimestepEmbedding(hidden_size, closed=closed)
        self.label = nn.Embedding(num_classes + null_class, hidden_size) if num_classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(
        self, timesteps: Float[Tensor, "B"] | Int[Tensor, "B"], class_labels: Int[Tensor, "B"] | None
    ) -> Float[Tensor, "B L D"]:
        time = self.timestep(timesteps)
        if self.label is None:
            if class_labels is not None:
                raise ValueError("this network has no classes: call it with class_labels=None")
            return time[:, None]
        if class_labels is None:
            raise ValueError(f"this network has {self.num_classes} classes: class_labels is missing")
        if class_labels.shape != timesteps.shape:
            raise ValueError(
                f"class_labels of shape {tuple(class_labels.shape)}: expected one per timestep, {len(timesteps)} in all"
            )
        return torch.stack([time, self.label(class_labels)], dim=1)
