"""`train`: from a RunConfig to a run folder with a log, samples, checkpoints and a finished model."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti import streams
from smalti.checkpoints import CheckpointStore, save_model
from smalti.checkpoints.saver import AsyncSaver
from smalti.checkpoints.together import Together
from smalti.config import to_dict
from smalti.data import Split, split, to_uint8
from smalti.data.examples import Examples
from smalti.data.image_set import Catalogue
from smalti.data.open_examples import load_examples
from smalti.data.order import training_order
from smalti.diffusion.levels import Schedule, build_schedule
from smalti.errors import ConfigError, PreemptedError
from smalti.evaluation.metric import Estimate
from smalti.latents import Codec, PixelCodec, codec_of, decode_batches
from smalti.models import BackboneConfig, build_backbone, config_of
from smalti.presets import parse_overrides, preset_config
from smalti.report.images import save_grid
from smalti.sampling import sample_latents
from smalti.training.baselines import Baselines, baselines, example_moments
from smalti.training.batches import BatchSource
from smalti.training.config import RunConfig
from smalti.training.device import autocast_dtype, resolve_device
from smalti.training.distributed import Parallel
from smalti.training.ema import EMA, default_decay
from smalti.training.guard import Guard
from smalti.training.log import tensorboard_installed
from smalti.training.loop import StepReport, train_steps
from smalti.training.optim import build_optimizer
from smalti.training.peers import Peers
from smalti.training.state import TrainState
from smalti.training.stop import StopRequest
from smalti.training.validation import StrataLoss, Triples, make_triples, validate, validation_unit
from smalti.workflows.progress import ProgressReport
from smalti.workflows.quality import QualityCheck, prepare_quality
from smalti.workflows.train_together import (
    allowed_micro_batch,
    locked,
    open_log,
    settle,
    told_of_memory,
    whole_network,
)
from smalti.world import World, world

PREVIEW_ROWS, PREVIEW_COLUMNS = 10, 4


@dataclass(frozen=True)
class TrainResult:
    """A finished run; the model holds the averaged weights, of a network in parts only on the first process."""

    out: Path
    model: nn.Module
    ema_decay: float
    validation: StrataLoss | None
    baselines: Baselines | None


@dataclass(frozen=True, eq=False)
class Run:
    """What stays the same during a run."""

    config: RunConfig
    device: torch.device
    examples: Examples
    codec: Codec
    split: Split
    schedule: Schedule
    batches: BatchSource
    triples: Triples | None
    quality: QualityCheck | None
    parallel: Parallel

    @property
    def world(self) -> World:
        return self.parallel.world

    @property
    def catalogue(self) -> Catalogue:
        return self.examples.catalogue


def model_config(config: RunConfig, examples: Examples) -> BackboneConfig:
    """The preset, fitted to the examples (size, channels, classes), then changed as the user says."""
    wanted = parse_overrides(config.override)
    channels, rows, columns = examples.sample_shape
    fitted: dict[str, Any] = {
        "sample_size": (rows, columns),
        "in_channels": channels,
        "num_classes": len(examples.catalogue.class_names),
    }
    if config.objective.schedule == "flow":
        fitted["learned_variance"] = False  # a path without steps has no step variance to learn
    return preset_config(config.model, **(fitted | wanted))


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
    device = resolve_device(config.device)
    patience = timedelta(minutes=config.parallel.timeout_minutes)
    with world(device, patience) as me, Peers(me) as peers, peers.watched():
        run, model = prepare_run(config, me)
        with locked(config.out, me, steal=steal):
            changed = settle(config, run.catalogue, model, me)
            return _run(run, model, changed, peers, on_step)


def prepare_run(config: RunConfig, me: World | None = None) -> tuple[Run, BackboneConfig]:
    """Load the images and settle everything that stays the same; nothing is written.

    Raises:
        SmaltiError: settings, images or the two together do not fit.
    """
    me = World() if me is None else me
    device = me.device(resolve_device(config.device))
    if config.parallel.compile and config.stochastic_depth:
        raise ConfigError("compiled blocks do not see the hooks of stochastic_depth: set it to 0, or leave compile out")
    data = config.data
    examples = load_examples(data.path, data.image_size, posterior=data.posterior, skip_unreadable=data.skip_unreadable)
    if data.flip and not examples.can_flip:
        raise ConfigError(
            f"data.flip: {data.path} was encoded without mirrored images; encode it again with --flips stored"
        )
    catalogue = examples.catalogue
    model = model_config(config, examples)
    conditional = bool(catalogue.class_names) and model.num_classes > 0  # num_classes=0 trains without the labels
    if conditional and config.objective.label_dropout and not model.null_class:
        raise ConfigError("label_dropout hides labels behind the null class: set null_class=true or label_dropout 0")
    if not catalogue.class_names and model.num_classes:
        raise ConfigError(f"num_classes is {model.num_classes}, but {catalogue.name} has no classes: set num_classes=0")
    if conditional and model.num_classes < len(catalogue.class_names):
        raise ConfigError(
            f"num_classes {model.num_classes} is less than the {len(catalogue.class_names)} classes of the data"
        )
    parts = split(catalogue, data.validation_fraction, config.seed)
    schedule = build_schedule(config.objective.schedule, config.objective.num_train_timesteps)
    order = training_order(
        catalogue,
        parts.train,
        config.seed,
        class_balanced=data.class_balanced,
        shuffle=data.shuffle,
        window=data.shuffle_window,
    )
    batches = BatchSource(
        examples=examples,
        order=order,
        schedule=schedule,
        objective=config.objective,
        conditional=conditional,
        label_tables=model.label_tables,
        null_class=model.num_classes if conditional and model.null_class else None,
        flip=data.flip,
        seed=config.seed,
    )
    held_out = parts.validation.tolist()
    triples = make_triples(examples, held_out, schedule, config.seed, conditional=conditional) if held_out else None
    # Opened before the first step, so that it is not found missing at the first picture.
    codec = codec_of(examples.codec, device=device) if config.sample_every or config.quality.every else PixelCodec()
    quality = prepare_quality(config.quality, examples, codec, parts.train, config.seed, device)
    parallel = Parallel.prepare(config.parallel, me, device, config.precision)
    return Run(config, device, examples, codec, parts, schedule, batches, triples, quality, parallel), model


def new_state(run: Run, model: BackboneConfig) -> TrainState:
    """Step 0: weights drawn from the run's seed, the same on all processes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.key(run.config.seed, streams.INIT) & (2**63 - 1))
        network = build_backbone(model).to(run.device)
    decay = run.config.ema_decay
    ema = EMA(network, default_decay(run.config.steps) if decay is None else decay)
    run.parallel.evaluated(ema.model)
    engine = run.parallel.trained(network)
    guard = Guard(run.config.guard, run.config.out if run.world.rank == 0 else None)
    guard.adopt(run.world.broadcast_object(list(guard.rewinds)))
    return TrainState(network, ema, build_optimizer(network, run.config.optimizer), guard=guard, engine=engine)


def _run(
    run: Run,
    model: BackboneConfig,
    changed: list[str],
    peers: Peers,
    on_step: Callable[[StepReport], None] | None,
) -> TrainResult:
    config, me = run.config, run.world
    store = CheckpointStore(
        config.out / "checkpoints",
        keep_last=config.keep_checkpoints,
        keep_every=config.store.keep_every,
        keep_best=config.store.keep_best,
        sole_writer=True,
        world=me,
    )
    lines = _baselines(run) if run.triples is not None else None
    with ExitStack() as at_end:
        silence = at_end.enter_context(open(os.devnull, "w")) if me.rank else None
        stop = at_end.enter_context(StopRequest())
        progress = at_end.enter_context(ProgressReport("training", config.steps, out=silence))
        saver = at_end.enter_context(AsyncSaver(store, timeout=60 * config.parallel.timeout_minutes))
        start = _Start(run, model, store, saver, changed, lines)
        while (finished := _train(start, stop, progress, peers, on_step)) is None:
            changed.clear()  # told once
        state, loss = finished
    if loss is None and run.triples is not None:
        loss = _validate(run, state)
    network = whole_network(state.ema.model, model, me)

    def write(_: object) -> None:
        save_model(config.out / "model", network, extra=model_extra(run, state.step))

    Together(me).step(lambda: None, write)
    return TrainResult(config.out, network, state.ema.decay, loss, lines)


@dataclass(frozen=True, eq=False)
class _Start:
    """What a run begins from, and begins from again after a rewind."""

    run: Run
    model: BackboneConfig
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
    state = new_state(run, start.model)
    stored = start.store.load_newest(on_skip=lambda reason: progress.note(f"passed over {reason}"))
    if stored is not None:
        state.restore(stored)
        progress.note(f"continuing {config.out} at step {state.step}")
        progress.continue_from(state.step)
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
            progress.update(step, f"loss {report.loss:.4f}" + (f", validation {loss.mean:.4f}" if loss else ""))
            losses += [] if report.skipped else [report.loss]
            if _due(step, config.log_every, last):
                now = time.monotonic()
                speed = (step - since_step) * config.batch_size / max(now - since, 1e-9)
                log.write("train", **_values(report, losses), images_per_second=round(speed, 2), processes=me.size)
                since, since_step, losses = now, step, []
            score: float | None = None
            if run.triples is not None and _due(step, config.validate_every, last):
                loss = _validate(run, state)
                score = loss.mean
                log.write("validation", step, loss=loss.mean, strata=list(loss.strata))
            if run.quality is not None and _due(step, config.quality.every, last):
                looked = run.quality.look(_quality_samples(run, state.ema.model))
                log.write("quality", step, **_quality_values(looked))
                progress.note(run.quality.sentence(step, looked))
            if _due(step, config.sample_every, last):
                save_preview(run, state.ema.model, config.out / "samples" / f"step-{step:07d}.png")
            if report.failed:
                saver.wait()
            told = stop.received if me.size == 1 else report.stop  # alone, no need to wait for the next exchange
            if _due(step, config.checkpoint_every, last) or last or told:
                saver.save(step, state.groups(), state.counters(), score=score)
            if last or told or config.store.wait:
                saver.wait()
            if told and not last:
                raise PreemptedError(
                    f"stopped by {told.name} and saved at step {step}; the same command continues {config.out}"
                )
    return state, loss


def model_extra(run: Run, step: int) -> dict[str, Any]:
    """What a finished model must know to be sampled from: what it predicts, on which schedule, and its classes."""
    return {
        "objective": to_dict(run.config.objective),
        "class_names": list(run.catalogue.class_names) if run.batches.conditional else [],
        "codec": to_dict(run.examples.codec),
        "value_range": [-1, 1],
        "trained": {"data": run.config.data.path, "fingerprint": run.catalogue.fingerprint, "steps": step},
    }


def save_preview(run: Run, model: nn.Module, path: Path) -> None:
    """A grid of samples with fixed seeds, one row per class (the first ten), or four rows of one kind."""
    classes = min(PREVIEW_ROWS, len(run.catalogue.class_names)) if run.batches.conditional else 0
    labels = [k for k in range(classes) for _ in range(PREVIEW_COLUMNS)] if classes else None
    count = len(labels) if labels is not None else PREVIEW_COLUMNS**2
    images = torch.cat(list(_draw(run, model, range(count), labels)))
    if run.world.rank == 0:  # all draw, because the network may be in parts
        save_grid(images, path, columns=PREVIEW_COLUMNS)


def _quality_samples(run: Run, model: nn.Module) -> Iterator[Tensor]:
    """8-bit samples of the same seeds at every look, so that the curve shows the network and not the draw."""
    seeds = range(run.config.quality.images)
    classes = len(run.catalogue.class_names) if run.batches.conditional else 0
    labels = [streams.key(seed, streams.SAMPLE_LABEL) % classes for seed in seeds] if classes else None
    return (to_uint8(images) for images in _draw(run, model, seeds, labels))


def _quality_values(found: Mapping[str, Estimate]) -> dict[str, float]:
    """One log line: each number, and its standard error where there is one."""
    errors = {f"{name}_error": e.standard_error for name, e in found.items() if e.standard_error is not None}
    return {name: estimate.value for name, estimate in found.items()} | errors


def _draw(run: Run, model: nn.Module, seeds: Sequence[int], labels: Sequence[int] | None) -> Iterator[Tensor]:
    """Samples as `preview` says, decoded, (B, 3, H, W) pieces on the CPU."""
    batches = sample_latents(
        model,
        seeds=seeds,
        class_labels=labels,
        sample_shape=run.examples.sample_shape,
        schedule=run.schedule,
        config=run.config.preview,
        prediction=run.config.objective.prediction,
        learned_variance=config_of(model).learned_variance,
        null_class=run.batches.null_class,
        micro_batch=32,
        device=run.device,
        autocast=autocast_dtype(run.config.precision),
    )
    return decode_batches(run.codec, (batch.latents for batch in batches))


def _validate(run: Run, state: TrainState) -> StrataLoss:
    assert run.triples is not None
    objective = run.config.objective
    return validate(
        state.ema.model,
        run.triples,
        objective.prediction,
        unit=validation_unit(objective),
        precision=run.config.precision,
        world=run.world,
    )


def _baselines(run: Run) -> Baselines:
    assert run.triples is not None
    moments = example_moments(run.examples, run.split.train.tolist())
    return baselines(moments, run.triples, validation_unit(run.config.objective))


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
