"""The training loop: a paragraph that yields after every step. Whoever iterates logs, validates, samples and saves."""

import math
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.diffusion.objectives import ObjectiveConfig, training_losses
from smalti.models import config_of
from smalti.training.batches import BatchSource, TrainBatch
from smalti.training.config import RunConfig
from smalti.training.device import autocast
from smalti.training.distributed import whole
from smalti.training.optim import learning_rate
from smalti.training.state import TrainState
from smalti.training.stochastic_depth import stochastic_depth
from smalti.training.stop import StopRequest
from smalti.world import World


class StepReport(NamedTuple):
    """One finished step; the same on all processes.

    Args:
        loss: mean over the whole batch.
        grad_norm: of the whole batch's gradient, before clipping.
        skipped: the weights are as before.
        rewind: they are to be those of the newest checkpoint; no step follows this one.
        micro_batch: images per forward pass and process, as memory has allowed so far.
        stop: which signal some process has got, None = none.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    rewind: bool = False
    micro_batch: int = 0
    stop: signal.Signals | None = None


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


def train_steps(
    state: TrainState,
    batches: BatchSource,
    config: RunConfig,
    stopping: Callable[[], signal.Signals | None] = lambda: None,
) -> Iterator[StepReport]:
    """Train from `state.step` to `config.steps`, changing `state` in place.

    Between two reports the state is that of a whole number of steps, so it may be saved at each of them. Every process
    of the run iterates, and whatever they decide, they decide on numbers that all of them have.

    Args:
        stopping: the signal that this process has got, if any.

    Raises:
        NumericError: too many of the last steps had a loss or gradient that was not finite.
    """
    trained = [p for p in state.model.parameters() if p.requires_grad]
    clip = math.inf if config.optimizer.clip_norm is None else config.optimizer.clip_norm
    world = state.engine.world
    micro_batch = min(config.micro_batch or config.batch_size, -(-config.batch_size // world.size))
    while state.step < config.steps:
        rate = learning_rate(config.optimizer, state.step, config.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        positions = range(state.step * config.batch_size, (state.step + 1) * config.batch_size)
        passed_over = state.guard.passes_over(state.step)
        loss = norm = math.nan
        if not passed_over:
            loss = _gradients(state, batches, config, parts_of(state.step, config.batch_size, world, micro_batch))
            norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, clip)))
        # One exchange for all that is decided. A sum that is not finite stays so.
        told = stopping()
        flags = [float(told == number) for number in StopRequest.signals]
        loss, wrong, *flags = world.sum(loss, float(not math.isfinite(norm)), *flags)
        norm = math.nan if wrong and math.isfinite(norm) else norm
        verdict = "skip" if passed_over else state.guard.judge(state.step, loss, norm, positions)
        if verdict == "step":
            state.optimizer.step()
            state.ema.update(state.model, state.step - len(state.skipped))
        state.optimizer.zero_grad()
        state.step += 1
        told = next((number for number, count in zip(StopRequest.signals, flags, strict=True) if count), None)
        if world.size == 1:  # no reason to wait for the next exchange
            told = stopping()
        yield StepReport(state.step, loss, norm, rate, verdict != "step", verdict == "rewind", micro_batch, told)
        if verdict == "rewind":
            return


def _gradients(state: TrainState, batches: BatchSource, config: RunConfig, parts: list[Part]) -> float:
    """Leave the gradient of the batch's mean loss, and return this process's share of that mean."""
    loss = 0.0
    for k, part in enumerate(parts):
        batch = batches.at(part.start, part.size)
        with state.engine.micro_batch(last=k == len(parts) - 1):
            loss += _run_micro_batch(state, batch, batches.objective, config, counts=part.counts)
    return loss / state.engine.world.size


def _run_micro_batch(
    state: TrainState, batch: TrainBatch, objective: ObjectiveConfig, config: RunConfig, *, counts: bool
) -> float:
    """Forward and backward of a part of a batch. Exchanged gradients are means over the processes, so losses are sums
    over the samples divided by each process's fair share of the batch."""
    device = next(state.model.parameters()).device
    labels = None if batch.class_labels is None else batch.class_labels.to(device)
    # Both also around the backward pass: it may compute blocks again.
    depth = stochastic_depth(state.model, config.stochastic_depth, config.seed, batch.positions)
    with depth:
        with autocast(device, config.precision):
            losses: Tensor = training_losses(
                state.engine.call,
                batch.x0.to(device),
                labels,
                eps=batch.eps.to(device),
                levels=batch.levels,
                config=objective,
                learned_variance=config_of(state.model).learned_variance,
            ).loss
        if not counts:
            losses = losses.where(torch.zeros_like(losses, dtype=torch.bool), 0.0)
        loss = losses.sum() / (config.batch_size / state.engine.world.size)
        loss.backward()
    return loss.item()
