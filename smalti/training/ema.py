"""The exponential moving average of the weights: what is sampled from and evaluated."""

import copy

import torch
from torch import nn

from smalti.training.distributed import local_part

# The average looks back over this share of the run. Chosen by `python -m benchmarks ema`; see docs/guide/train.md.
HORIZON = 0.04


def default_decay(steps: int) -> float:
    """A decay whose memory, 1 / (1 - decay) steps, is 4 % of the run; 0.9999 only for runs of 250,000 steps and more.

    0.9999 remembers 10,000 steps: as the papers' code uses it, from the first step on, it still holds 82 % of the
    random initial weights after a run of 2,000. The rising decay of `EMA` rids it of those, but not of early steps.
    """
    return 1 - 1 / min(10_000.0, max(1.0, HORIZON * steps))


class EMA:
    """A copy of the network whose trainable weights trail those of the original; everything else is copied.

    Of a network in parts, each process averages its own; the copy is made before, and cut up in the same way.

    Args:
        decay: share of the old average that stays at each update. Early updates use the smaller `(1 + n) / (10 + n)`,
            so that the initial weights leave no trace: less than 1e-9 after 100 updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, update: int) -> float:
        """What stays of the average at this update, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self, model: nn.Module, update: int) -> None:
        """Take one step towards `model`; `update` counts from 0."""
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        trained = [(local_part(own), local_part(other)) for own, other in pairs if other.requires_grad]
        torch._foreach_lerp_([own for own, _ in trained], [other for _, other in trained], 1 - self.decay_at(update))
        fixed = [(own, other) for own, other in pairs if not other.requires_grad]
        for own, other in [*fixed, *zip(self.model.buffers(), model.buffers(), strict=True)]:
            local_part(own).copy_(local_part(other))
