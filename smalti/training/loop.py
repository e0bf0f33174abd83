"""The training loop: a paragraph that yields after every step. Whoever iterates logs, validates, samples and saves."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from smalti.diffusion.objectives import ObjectiveConfig, training_losses
from smalti.errors import NumericError
from smalti.models import config_of
from smalti.training.batches import BatchSource, TrainBatch
from smalti.training.config import RunConfig
from smalti.training.device import autocast
from smalti.training.optim import learning_rate
from smalti.training.state import TrainState
from smalti.training.stochastic_depth import stochastic_depth

SKIP_WINDOW, SKIP_BUDGET = 1000, 10


class StepReport(NamedTuple):
    """One finished step."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool


def train_steps(state: TrainState, batches: BatchSource, config: RunConfig) -> Iterator[StepReport]:
    """Train from `state.step` to `config.steps`, changing `state` in place.

    Between two reports the state is that of a whole number of steps, so it may be saved at each of them.

    Raises:
        NumericError: more than 10 of the last 1000 steps had a loss or gradient that was not finite.
    """
    device = next(state.model.parameters()).device
    trained = [p for p in state.model.parameters() if p.requires_grad]
    clip = math.inf if config.optimizer.clip_norm is None else config.optimizer.clip_norm
    micro_batch = config.micro_batch or config.batch_size
    while state.step < config.steps:
        rate = learning_rate(config.optimizer, state.step, config.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        for start in range(0, config.batch_size, micro_batch):
            count = min(micro_batch, config.batch_size - start)
            batch = batches.at(state.step * config.batch_size + start, count)
            part = _loss(state, batch, batches.objective, config, device) / config.batch_size
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip).item()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            state.optimizer.step()
            state.ema.update(state.model, state.step - len(state.skipped))
        else:
            _note_skip(state)
        state.optimizer.zero_grad()
        state.step += 1
        yield StepReport(state.step, loss, norm, rate, not finite)


def _loss(
    state: TrainState, batch: TrainBatch, objective: ObjectiveConfig, config: RunConfig, device: torch.device
) -> torch.Tensor:
    """Sum of the losses of the samples; the caller divides by the size of the whole batch."""
    labels = None if batch.class_labels is None else batch.class_labels.to(device)
    depth = stochastic_depth(state.model, config.stochastic_depth, config.seed, batch.positions)
    with autocast(device, config.precision), depth:
        losses = training_losses(
            state.model,
            batch.x0.to(device),
            labels,
            eps=batch.eps.to(device),
            levels=batch.levels,
            config=objective,
            learned_variance=config_of(state.model).learned_variance,
        )
    return losses.loss.sum()


def _note_skip(state: TrainState) -> None:
    """Remember a step that changed nothing, and stop the run when there are too many of them."""
    state.skipped = (*state.skipped, state.step)
    recent = [step for step in state.skipped if step > state.step - SKIP_WINDOW]
    if len(recent) > SKIP_BUDGET:
        raise NumericError(
            f"{len(recent)} of the last {SKIP_WINDOW} steps had a loss or gradient that is not finite (steps "
            f"{', '.join(map(str, recent))}); the weights are those before them. Lower the learning rate, clip "
            f"gradients (--optimizer.clip-norm 1) or train in fp32"
        )
