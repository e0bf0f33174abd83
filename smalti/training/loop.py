"""The training loop: a paragraph that yields after every step. Whoever iterates logs, validates, samples and saves."""

import math
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.diffusion.objectives import ObjectiveConfig, training_losses
from smalti.errors import ConfigError, SmaltiError
from smalti.models import config_of
from smalti.training.batches import BatchSource, TrainBatch
from smalti.training.config import RunConfig
from smalti.training.device import autocast, products
from smalti.training.distributed import whole
from smalti.training.fused_update import Updates
from smalti.training.optim import learning_rate
from smalti.training.state import TrainState
from smalti.training.step_batches import StepBatches, parts_of
from smalti.training.stochastic_depth import stochastic_depth
from smalti.training.stop import StopRequest


class StepReport(NamedTuple):
    """One finished step; the same on all processes.

    Args:
        loss: mean over the whole batch.
        grad_norm: of the whole batch's gradient, before clipping.
        skipped: the weights are as before.
        rewind: they are to be those of the newest checkpoint; no step follows this one.
        micro_batch: images per forward pass and process, as memory has allowed so far.
        stop: which signal some process has got, None = none.
        failed: some process said that it is failing.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    rewind: bool = False
    micro_batch: int = 0
    stop: signal.Signals | None = None
    failed: bool = False


class MicroBatchTooLargeError(SmaltiError):
    """Memory did not suffice where one process alone cannot try again: the run ends, and goes on with smaller parts.

    Args:
        micro_batch: half of what was too much.
    """

    exit_code = 75

    def __init__(self, message: str, micro_batch: int) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch


def train_steps(
    state: TrainState,
    batches: BatchSource,
    config: RunConfig,
    stopping: Callable[[], signal.Signals | None] = lambda: None,
    failing: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Train from `state.step` to `config.steps`, changing `state` in place.

    Between two reports the state is that of a whole number of steps, so it may be saved at each of them. Every process
    of the run iterates, and whatever they decide, they decide on numbers that all of them have.

    Args:
        stopping: the signal that this process has got, if any.
        failing: whether something beside the training has failed on this process; see `StepReport.failed`.

    Raises:
        NumericError: too many of the last steps had a loss or gradient that was not finite.
        ConfigError: memory does not suffice for a single image.
        MicroBatchTooLargeError: it does not suffice for a micro-batch, and the processes cannot agree on another one
            any more.
        WorkerDiedError: a process that loads data was killed.
    """
    device = next(state.model.parameters()).device
    with StepBatches(batches, config, state.engine.world, pin=device.type == "cuda") as ahead:
        yield from _steps(state, batches, ahead, config, stopping, failing)


def _steps(
    state: TrainState,
    batches: BatchSource,
    ahead: StepBatches,
    config: RunConfig,
    stopping: Callable[[], signal.Signals | None],
    failing: Callable[[], bool],
) -> Iterator[StepReport]:
    trained = [p for p in state.model.parameters() if p.requires_grad]
    clip = math.inf if config.optimizer.clip_norm is None else config.optimizer.clip_norm
    world = state.engine.world
    update = Updates()
    micro_batch = min(config.micro_batch or config.batch_size, -(-config.batch_size // world.size))
    if state.engine.strategy == "ddp" and state.step < config.steps:
        micro_batch = _tried(state, batches, config, micro_batch)
    while state.step < config.steps:
        rate = learning_rate(config.optimizer, state.step, config.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        positions = range(state.step * config.batch_size, (state.step + 1) * config.batch_size)
        passed_over = state.guard.passes_over(state.step)
        loss = norm = math.nan
        if not passed_over:
            loss, micro_batch = _gradients_that_fit(state, ahead, config, micro_batch)
            norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, clip)))
        # One exchange for all that is decided. A sum that is not finite stays so.
        told = stopping()
        flags = [float(told == number) for number in StopRequest.signals]
        wrong, failed = float(not math.isfinite(norm)), float(failing())
        firsts = norm if world.rank == 0 else 0.0  # unequal machines may differ in the last bit of the same norm
        loss, wrong, failed, norm, *flags = world.sum(loss, wrong, failed, firsts, *flags)
        norm = math.nan if wrong else norm
        verdict = "skip" if passed_over else state.guard.judge(state.step, loss, norm, positions)
        if verdict == "step":
            update(state.optimizer, state.ema, state.model, state.step - len(state.skipped))
        state.optimizer.zero_grad()
        state.step += 1
        told = next((number for number, count in zip(StopRequest.signals, flags, strict=True) if count), None)
        skipped, rewind = verdict != "step", verdict == "rewind"
        yield StepReport(state.step, loss, norm, rate, skipped, rewind, micro_batch, told, bool(failed))
        if verdict == "rewind":
            return


def _gradients_that_fit(
    state: TrainState, ahead: StepBatches, config: RunConfig, micro_batch: int
) -> tuple[float, int]:
    """`_gradients`, again from the start with parts half as large where memory does not suffice."""
    world = state.engine.world
    while True:
        try:
            return _gradients(state, ahead, config, micro_batch), micro_batch
        except torch.OutOfMemoryError as error:
            smaller = _halved(micro_batch, error)
            if world.size > 1:  # the others are in the middle of the step, and wait for this process
                raise MicroBatchTooLargeError(
                    f"process {world.rank} ran out of memory at step {state.step} with {micro_batch} images per "
                    f"forward pass; the same command continues with {smaller}",
                    smaller,
                ) from error
        # Outside of the handler, which keeps what the failed pass had made.
        micro_batch = smaller
        _clear(state)


def _tried(state: TrainState, batches: BatchSource, config: RunConfig, micro_batch: int) -> int:
    """The micro-batch that all processes have memory for, by one that each takes alone and that leaves nothing."""
    world = state.engine.world
    while True:
        part, error = parts_of(state.step, config.batch_size, world, micro_batch)[0], None
        try:
            with state.engine.micro_batch(last=False):
                batch = batches.at(part.start, part.size)
                _run_micro_batch(state, batch, batches.objective, config, counts=part.counts)
        except torch.OutOfMemoryError as caught:
            error = caught.with_traceback(None)
        _clear(state)
        if not any(world.sum(float(error is not None))):
            break
        micro_batch = _halved(micro_batch, error)
    # DDP lays out anew what it exchanges after the first time, and the rounding of sums over three or more processes
    # depends on the layout: this way every step of a run has the same one, also the first after a restart.
    batch = batches.at(state.step * config.batch_size, 1)
    with state.engine.micro_batch(last=True):
        _run_micro_batch(state, batch, batches.objective, config, counts=True)
    _clear(state)
    return micro_batch


def _halved(micro_batch: int, error: Exception | None) -> int:
    if micro_batch == 1:
        raise ConfigError(
            "memory does not suffice for a forward and backward pass of a single image: keep less of it "
            "(--parallel.activation-checkpointing full, --precision bf16), or share the network between GPUs "
            "(--parallel.strategy fsdp)"
        ) from error
    return micro_batch // 2


def _clear(state: TrainState) -> None:
    state.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gradients(state: TrainState, ahead: StepBatches, config: RunConfig, micro_batch: int) -> float:
    """Leave the gradient of the batch's mean loss, and return this process's share of that mean."""
    loss = 0.0
    count = len(parts_of(state.step, config.batch_size, state.engine.world, micro_batch))
    for k, (part, batch) in enumerate(ahead.of(state.step, micro_batch)):
        with state.engine.micro_batch(last=k == count - 1):
            loss += _run_micro_batch(state, batch, ahead.objective, config, counts=part.counts)
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
    with depth, products(device, config.precision):
        with autocast(device, config.precision):
            losses: Tensor = training_losses(
                state.engine.call,
                batch.x0.to(device, non_blocking=True),
                labels,
                eps=batch.eps.to(device, non_blocking=True),
                levels=batch.levels,
                config=objective,
                learned_variance=config_of(state.model).learned_variance,
            ).loss
        if not counts:
            losses = losses.where(torch.zeros_like(losses, dtype=torch.bool), 0.0)
        loss = losses.sum() / (config.batch_size / state.engine.world.size)
        loss.backward()
    return loss.item()
