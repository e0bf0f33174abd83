"""Multi-head softmax attention over all tokens. Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.nn.layers import Grid, linear
from smalti.nn.mixers.base import ALONE, MixerConfig, Place
from smalti.ops import attention


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Plain attention: biases on all projections, scale (D / heads)^-1/2, no normalised queries or keys."""

    kind: ClassVar[str] = "attention"
    num_heads: int


class Attention(nn.Module):
    """One product gives queries, keys and values, packed in that order; the grid is not used."""

    def __init__(self, config: AttentionConfig, hidden_size: int, place: Place = ALONE) -> None:
        super().__init__()
        if config.num_heads < 1 or hidden_size % config.num_heads:
            raise ConfigError(
                f"hidden_size {hidden_size} cannot be split into {config.num_heads} heads: choose a divisor of it"
            )
        self.num_heads = config.num_heads
        self.qkv = linear(hidden_size, 3 * hidden_size)
        self.out = linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D/heads)
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))
