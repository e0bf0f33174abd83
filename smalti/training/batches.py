"""From a step number to everything that the step needs: examples, labels, noise, levels, all functions of counters."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti import streams
from smalti.data import Order
from smalti.data.examples import Examples
from smalti.diffusion.labels import drop_labels, drop_mask
from smalti.diffusion.levels import LevelBatch, Schedule
from smalti.diffusion.objectives import ObjectiveConfig, draw_levels
from smalti.diffusion.timesteps import keyed_uniforms


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """What the loss of one step, or of a part of one, is a function of; all on the CPU.

    Attributes:
        indices: which examples of the set these are; None where they are of no set.
    """

    x0: Float[Tensor, "B C H W"]
    class_labels: Int[Tensor, "B"] | Int[Tensor, "B K"] | None
    eps: Float[Tensor, "B C H W"]
    levels: LevelBatch
    positions: range
    indices: Int[Tensor, "B"] | None = None

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True, eq=False)
class BatchSource:
    """Batches of a run by sample position.

    Position p of the run is the same example with the same flip, noise, level and label fate whatever the batch size,
    the micro-batch, the number of processes or the moment of the last restart.

    Args:
        null_class: what a hidden label becomes; None = labels are never hidden.
        conditional: whether the network is told the labels that the images have.
        label_tables: of the network; see `label_drop` of the objective.
    """

    examples: Examples
    order: Order
    schedule: Schedule
    objective: ObjectiveConfig
    null_class: int | None
    flip: bool
    seed: int
    conditional: bool = True
    label_tables: int = 1

    def at(self, start: int, count: int) -> TrainBatch:
        """The samples at positions `start` to `start + count - 1`."""
        positions = range(start, start + count)
        loaded = self.examples.load(self.order, positions, flip=self.flip, seed=self.seed)
        labels = loaded.class_labels if self.conditional else None
        if labels is not None and self.null_class is not None:
            labels = self._hide(labels, positions, self.null_class)
        levels = draw_levels(self.schedule, self.objective, keyed_uniforms(self.seed, streams.TIMESTEP, positions))
        return TrainBatch(loaded.x0, labels, self._noise(positions, loaded.x0), levels, positions, loaded.indices)

    def _hide(self, labels: Tensor, positions: range, null_class: int) -> Tensor:
        """One draw for all label tables, (B,), or one for each, (B, tables)."""
        if self.objective.label_drop == "shared" or self.label_tables == 1:
            uniforms = keyed_uniforms(self.seed, streams.LABEL_DROP, positions)
            return drop_labels(labels, drop_mask(uniforms, self.objective.label_dropout), null_class)
        columns = []
        for table in range(self.label_tables):
            uniforms = keyed_uniforms(self.seed, streams.LABEL_DROP, positions, table)
            columns.append(drop_labels(labels, drop_mask(uniforms, self.objective.label_dropout), null_class))
        return torch.stack(columns, dim=1)

    def _noise(self, positions: range, like: Tensor) -> Tensor:
        eps = torch.empty_like(like)
        for row, position in zip(eps, positions, strict=True):
            row.normal_(generator=streams.generator(self.seed, streams.NOISE, position))
        return eps
