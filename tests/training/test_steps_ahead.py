"""Batches made ahead by workers where the steps are not simply one after the other."""

import pytest
import torch
from tiny_runs import array_images

from smalti.data import SampleOrder
from smalti.data.examples import PixelExamples
from smalti.diffusion.levels import build_schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.training.batches import BatchSource
from smalti.training.config import DataConfig, RunConfig
from smalti.training.step_batches import StepBatches, parts_of
from smalti.world import World


@pytest.fixture
def source():
    images = array_images(torch.arange(20 * 4 * 4 * 3).view(20, 4, 4, 3).to(torch.uint8).numpy())
    return BatchSource(
        examples=PixelExamples(images),
        order=SampleOrder(range(20), 0),
        schedule=build_schedule("linear", 1000),
        objective=ObjectiveConfig(),
        null_class=None,
        flip=True,
        seed=0,
        conditional=False,
    )


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12: the workers take no lock
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_step_passed_over_and_a_smaller_micro_batch_give_the_batches_of_their_step(source, workers):
    """As after a rewind, whose step is left out, and where memory ran out in the middle of a step."""
    config = RunConfig(steps=9, batch_size=6, data=DataConfig(workers=workers))
    world = World(1, 2)
    with StepBatches(source, config, world, pin=False) as ahead:
        for step, micro_batch in ((1, 3), (2, 3), (4, 3), (5, 3), (5, 1), (6, 1), (7, 2), (7, 2), (8, 2)):
            found = list(ahead.of(step, micro_batch))
            assert [part for part, _ in found] == parts_of(step, 6, world, micro_batch)
            for part, batch in found:
                exact = source.at(part.start, part.size)
                assert batch.positions == exact.positions == range(part.start, part.start + part.size)
                assert torch.equal(batch.x0, exact.x0)
                assert torch.equal(batch.eps, exact.eps)
                assert torch.equal(batch.levels.timesteps, exact.levels.timesteps)


def test_a_process_without_samples_left_repeats_one_of_the_same_batch_uncounted():
    """One of another batch might be not finite, and this step would be skipped for it."""
    step, batch_size, size = 2, 5, 3
    shares = [parts_of(step, batch_size, World(rank, size), 1) for rank in range(size)]
    assert {len(parts) for parts in shares} == {2}
    batch = range(step * batch_size, (step + 1) * batch_size)
    assert sorted(part.start for parts in shares for part in parts if part.counts) == list(batch)
    (idle,) = [part for parts in shares for part in parts if not part.counts]
    assert idle.start in batch
    assert idle.size == 1
