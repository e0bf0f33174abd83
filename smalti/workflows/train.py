"""`train`: from a RunConfig to a run folder with a log, samples, checkpoints and a finished model."""

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import nn

from smalti.checkpoints import CheckpointStore, save_model
from smalti.checkpoints.mirror import Mirror
from smalti.checkpoints.saver import AsyncSaver
from smalti.checkpoints.together import Together
from smalti.errors import PreemptedError
from smalti.training.baselines import Baselines
from smalti.training.config import RunConfig
from smalti.training.device import resolve_device
from smalti.training.log import tensorboard_installed
from smalti.training.loop import StepReport, train_steps
from smalti.training.peers import Peers
from smalti.training.state import TrainState
from smalti.training.stop import StopRequest
from smalti.training.validation import StrataLoss
from smalti.workflows.progress import ProgressReport
from smalti.workflows.run_folder import check_run_folder
from smalti.workflows.run_identity import identity_of, refuse_another_run
from smalti.workflows.train_looks import baselines_of, quality_samples, quality_values, save_preview, validation_of
from smalti.workflows.train_setup import Run, model_extra, new_state, prepare_run
from smalti.workflows.train_together import (
    Part,
    allowed_micro_batch,
    changes_of,
    known_run,
    locked,
    marked,
    open_log,
    refusals_marked,
    told_of_memory,
    warn_of_slow_saves,
    whole_network,
)
from smalti.world import world


@dataclass(frozen=True)
class TrainResult:
    """A finished run; the model holds the averaged weights, of a network in parts only on the first process."""

    out: Path
    model: nn.Module
    ema_decay: float
    validation: StrataLoss | None
    baselines: Baselines | None


def train(
    config: RunConfig, *, steal: bool = False, on_step: Callable[[StepReport], None] | None = None
) -> TrainResult:
    """Train, or continue what the run folder holds; nothing is lost whenever this is stopped.

    Of several processes, each calls this; the first one writes and reports.

    Args:
        steal: take over a run folder that another machine left locked; only when its run is known to be over.
        on_step: told of every finished step.

    Raises:
        PreemptedError: stopped on request; the run was saved and the same call continues it.
        PeerLostError: another process of the run is gone; the same call continues.
        SmaltiError: whatever else the user can mend.
    """
    check_run_folder(config)
    device = resolve_device(config.device)
    patience = timedelta(minutes=config.parallel.timeout_minutes)
    with world(device, patience) as me, Peers(me) as peers, peers.watched():
        with refusals_marked(config.out):
            run, model = prepare_run(config, me)
        part = Part(config, run.catalogue, model, me)
        with locked(config.out, me, steal=steal), marked(part, lambda: peers.step):
            return _run(run, part, peers, on_step)


def _run(run: Run, part: Part, peers: Peers, on_step: Callable[[StepReport], None] | None) -> TrainResult:
    config, model, me = run.config, part.model, run.world
    changed = changes_of(part)

    last, every, best = config.keep_checkpoints, config.store.keep_every, config.store.keep_best
    mirror: Mirror | None = None
    if config.store.mirror:
        mirror = Mirror(config.store.mirror, keep_last=last, keep_every=every, keep_best=best)
    store = CheckpointStore(
        config.out / "checkpoints",
        keep_last=last,
        keep_every=every,
        keep_best=best,
        sole_writer=True,
        world=me,
        mirror=mirror,
    )
    lines = baselines_of(run) if run.triples is not None else None
    with ExitStack() as at_end:
        silence = at_end.enter_context(open(os.devnull, "w")) if me.rank else None
        stop = at_end.enter_context(StopRequest())
        progress = at_end.enter_context(ProgressReport("training", config.steps, out=silence))
        saver = at_end.enter_context(AsyncSaver(store, timeout=60 * config.parallel.timeout_minutes))
        start = _Start(run, part, store, saver, changed, lines)
        if run.parallel.note:
            progress.note(run.parallel.note)
        while (finished := _train(start, stop, progress, peers, on_step)) is None:
            changed.clear()  # told once
        state, loss = finished
    if loss is None and run.triples is not None:
        loss = validation_of(run, state)
    network = whole_network(state.ema.model, model, me)

    def write(_: object) -> None:
        save_model(config.out / "model", network, extra=model_extra(run, state.step))

    Together(me).step(lambda: None, write)
    return TrainResult(config.out, network, state.ema.decay, loss, lines)


@dataclass(frozen=True, eq=False)
class _Start:
    """What a run begins from, and begins from again after a rewind."""

    run: Run
    part: Part
    store: CheckpointStore
    saver: AsyncSaver
    changed: list[str]
    lines: Baselines | None


def _train(
    start: _Start,
    stop: StopRequest,
    progress: ProgressReport,
    peers: Peers,
    on_step: Callable[[StepReport], None] | None,
) -> tuple[TrainState, StrataLoss | None] | None:
    """From the newest checkpoint to the end; the last validation loss, if there was one. None = a rewind."""
    run, saver = start.run, start.saver
    config, me = run.config, run.world
    # Anew after a rewind, too: the weights of a run without a checkpoint are those of its seed.
    state = new_state(run, start.part.model)
    stored = start.store.load_newest(on_skip=lambda reason: progress.note(f"passed over {reason}"))
    identity = identity_of(config, run.catalogue)
    if stored is not None:
        refuse_another_run(stored.state.get("identity"), config, run.catalogue, str(stored.path))
        state.restore(stored)
        source = f", fetched from {start.store.fetched}" if start.store.fetched else ""
        progress.note(f"continuing {config.out} at step {state.step}{source}")
        progress.continue_from(state.step)
    start.part.begin()
    start.store.name_run((stored.run_id if stored is not None else None) or known_run(config.out, me))
    peers.advance(state.step)
    config = replace(config, micro_batch=allowed_micro_batch(config, me))
    first = state.step if stored is not None else -1
    with closing(open_log(config.out, first, me, tensorboard=tensorboard_installed())) as log:
        if stored is not None and start.changed:
            progress.note(f"settings changed: {'; '.join(start.changed)}")
            log.write("settings", state.step, changed=start.changed)
        if start.lines is not None and stored is None:
            log.write("baseline", 0, constant=start.lines.constant.mean, linear=start.lines.linear.mean)
        loss: StrataLoss | None = None
        micro_batch: int | None = None
        since, since_step, losses = time.monotonic(), state.step, list[float]()
        steps = train_steps(state, run.batches, config, lambda: stop.received, lambda: saver.failed)
        for report in told_of_memory(steps, run.config, me):
            step, last = report.step, report.step == config.steps
            peers.advance(step)
            if on_step is not None:
                on_step(report)
            if report.rewind:
                saver.wait()  # what is going to be read
                progress.note(f"step {step} is taken out of the run for its gradient: back to the newest checkpoint")
                return None
            if micro_batch is not None and report.micro_batch < micro_batch:
                log.write("memory", step, micro_batch=report.micro_batch)
                progress.note(f"out of memory: from step {step} on {report.micro_batch} images per forward pass")
            micro_batch = report.micro_batch
            # The end measures anew, and an older loss beside it would be taken for that of the finished run.
            known = f", validation {loss.mean:.4f}" if loss is not None and not last else ""
            progress.update(step, f"loss {report.loss:.4f}{known}")
            losses += [] if report.skipped else [report.loss]
            if _due(step, config.log_every, last):
                now = time.monotonic()
                speed = (step - since_step) * config.batch_size / max(now - since, 1e-9)
                log.write("train", **_values(report, losses), images_per_second=round(speed, 2), processes=me.size)
                since, since_step, losses = now, step, []
            score: float | None = None
            if run.triples is not None and _due(step, config.validate_every, last):
                loss = validation_of(run, state)
                score = loss.mean
                log.write("validation", step, loss=loss.mean, strata=list(loss.strata))
            if run.quality is not None and _due(step, config.quality.every, last):
                looked = run.quality.look(quality_samples(run, state.ema.model))
                if looked is not None:
                    log.write("quality", step, **quality_values(looked))
                    progress.note(run.quality.sentence(step, looked))
            if _due(step, config.sample_every, last):
                save_preview(run, state.ema.model, config.out / "samples" / f"step-{step:07d}.png")
            if report.failed:
                saver.wait()
            told = stop.received if me.size == 1 else report.stop  # alone, no need to wait for the next exchange
            if _due(step, config.checkpoint_every, last) or last or told:
                saver.save(step, state.groups(), state.counters() | {"identity": identity}, score=score)
                warn_of_slow_saves(saver.seconds, log, step, progress)
            if last or told or config.store.wait:
                saver.wait()
            if told and not last:
                raise PreemptedError(
                    f"stopped by {told.name} and saved at step {step}; the same command continues {config.out}",
                    told.name,
                )
    return state, loss


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _values(report: StepReport, losses: list[float]) -> dict[str, Any]:
    """One log line: the mean loss since the last line, the rest as of this step."""
    return {
        "step": report.step,
        "loss": sum(losses) / len(losses) if losses else None,
        "grad_norm": report.grad_norm if math.isfinite(report.grad_norm) else None,
        "learning_rate": report.learning_rate,
        "skipped": report.skipped,
    }
