"""What a process computes in a step: its share of the batch, cut into parts, made ahead by workers if it has some."""

from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import NamedTuple

from smalti.data.order import named_examples
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.training.batches import BatchSource, TrainBatch
from smalti.training.config import RunConfig
from smalti.training.prefetch import Prefetched, prefetched
from smalti.world import World


class Part(NamedTuple):
    """Samples of one forward pass."""

    start: int
    size: int
    counts: bool  # False: another process has samples left, and this one only keeps it company


def parts_of(step: int, batch_size: int, world: World, micro_batch: int) -> list[Part]:
    """The forward passes of this process in a step, whose samples it takes from a contiguous share of the batch.

    All processes make equally many, because each pass may be one of all together. One that runs out of samples repeats
    one of the same batch without counting it: were that one not finite, the step would be skipped for it anyway.
    """
    first = step * batch_size
    start, stop = (first + batch_size * rank // world.size for rank in (world.rank, world.rank + 1))
    largest = -(-batch_size // world.size)
    parts = [Part(at, min(micro_batch, stop - at), True) for at in range(start, stop, micro_batch)]
    idle = Part(first, 1, False)
    return parts + [idle] * (-(-largest // micro_batch) - len(parts))


class StepBatches:
    """The batches of one step after another, in a `with` block at whose end the workers are gone.

    Args:
        pin: in page-locked memory, from which a GPU copies while it computes.
    """

    def __init__(self, batches: BatchSource, config: RunConfig, world: World, *, pin: bool) -> None:
        self._batches, self._config, self._world, self._pin = batches, config, world, pin
        self._ahead: Prefetched[list[TrainBatch]] | None = None
        self._next = (-1, 0)  # step and micro-batch that come from the workers next

    @property
    def objective(self) -> ObjectiveConfig:
        """What the batches are drawn for."""
        return self._batches.objective

    def of(self, step: int, micro_batch: int) -> Iterator[tuple[Part, TrainBatch]]:
        """The parts of this process in a step, each with its samples.

        Raises:
            WorkerDiedError: a process that loads data was killed.
            DataError: what cannot be read is more than can be replaced.
        """
        parts = parts_of(step, self._config.batch_size, self._world, micro_batch)
        if not self._config.data.workers:
            yield from ((part, self._batches.at(part.start, part.size)) for part in parts)
            return
        yield from zip(parts, self._from_workers(step, micro_batch), strict=True)

    def _from_workers(self, step: int, micro_batch: int) -> list[TrainBatch]:
        if self._ahead is None or self._next[1] != micro_batch or self._next[0] > step:
            self.close()
            config, world = self._config, World(self._world.rank, self._world.size)  # what a worker may have of it
            load = partial(_load, self._batches, config.batch_size, world, micro_batch)
            self._ahead = prefetched(
                load, step, config.steps, workers=config.data.workers, pin=self._pin, describe=self._describe
            )
            self._next = (step, micro_batch)
        while True:  # steps whose batch was left out are made all the same
            made, at = next(self._ahead), self._next[0]
            self._next = (at + 1, micro_batch)
            if at == step:
                return made

    def _describe(self, step: int) -> str:
        parts = parts_of(step, self._config.batch_size, self._world, self._config.batch_size)
        positions = range(parts[0].start, parts[0].start + parts[0].size)
        return named_examples(self._batches.examples.catalogue, self._batches.order, positions)

    def close(self) -> None:
        """End the workers; `of` may be called again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __enter__(self) -> "StepBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _load(batches: BatchSource, batch_size: int, world: World, micro_batch: int, step: int) -> list[TrainBatch]:
    return [batches.at(part.start, part.size) for part in parts_of(step, batch_size, world, micro_batch)]
