"""How training spreads its attention over the levels: numbers in [0, 1) in, numbers or indices out, no hidden state."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti import streams
from smalti.errors import ConfigError


def keyed_uniforms(seed: int, stream: int, positions: Iterable[int], *ids: int) -> Float[Tensor, "B"]:
    """One number in [0, 1) per sample: a function of seed, stream and the sample's position in the run."""
    return torch.tensor([streams.uniform(seed, stream, position, *ids) for position in positions], dtype=torch.float64)


def logit_normal(uniforms: Float[Tensor, "B"], mean: float, std: float) -> Float[Tensor, "B"]:
    """Turn uniform numbers into ones whose logit is normal; still in [0, 1), and in the same order.

    Source: Esser et al. 2024, arXiv:2403.03206, eq. 19.
    """
    # Clamped half a step inside the open interval, where the inverse of the normal distribution is finite.
    inside = uniforms.double().clamp(2.0**-54, 1 - 2.0**-53)
    return torch.sigmoid(mean + std * torch.special.ndtri(inside)).clamp(max=1 - 2.0**-53)


class LossSecondMoment:
    """Importance sampling of chain indices: visit a level in proportion to the root mean square of its recent losses.

    Args:
        num_timesteps: length of the chain.
        history_per_term: losses remembered per level; until every level has that many, all are equally likely.
        uniform_prob: share of draws that stay uniform, so that no level is forgotten.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 18.
    """

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        if num_timesteps < 1 or history_per_term < 1 or not 0 <= uniform_prob <= 1:
            raise ConfigError(
                f"num_timesteps {num_timesteps} and history_per_term {history_per_term} must be at least 1, "
                f"uniform_prob {uniform_prob} between 0 and 1"
            )
        self.uniform_prob = uniform_prob
        self.history = torch.zeros(num_timesteps, history_per_term, dtype=torch.float64)
        self.counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def update(self, indices: Int[Tensor, "B"], losses: Float[Tensor, "B"]) -> None:
        """Remember losses in the order given; the oldest of a level is forgotten first."""
        for index, loss in zip(indices.tolist(), losses.detach().double().tolist(), strict=True):
            self.history[index, self.counts[index] % self.history.shape[1]] = loss
            self.counts[index] += 1

    def probabilities(self) -> Float[Tensor, "T"]:
        """How likely each level is to be drawn next."""
        size = len(self.history)
        if bool((self.counts < self.history.shape[1]).any()):
            return torch.full((size,), 1 / size, dtype=torch.float64)
        moments = self.history.square().mean(1).sqrt()
        return moments / moments.sum() * (1 - self.uniform_prob) + self.uniform_prob / size

    def draw(self, uniforms: Float[Tensor, "B"]) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
        """Indices, and the weights `1 / (T p)` that keep the expected loss what it was."""
        probabilities = self.probabilities()
        indices = torch.searchsorted(probabilities.cumsum(0), uniforms.cpu().double(), right=True)
        indices = indices.clamp(max=len(probabilities) - 1)
        return indices, 1 / (len(probabilities) * probabilities[indices])
