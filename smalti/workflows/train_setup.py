"""What stays the same during a training run, and what it begins from."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from smalti import streams
from smalti.checkpoints.together import Together
from smalti.config import to_dict
from smalti.data import Split, split
from smalti.data.examples import Examples
from smalti.data.image_set import Catalogue
from smalti.data.open_examples import load_examples
from smalti.data.order import training_order
from smalti.diffusion.levels import Schedule, build_schedule
from smalti.errors import ConfigError
from smalti.latents import Codec, PixelCodec, codec_of
from smalti.models import BackboneConfig, build_backbone
from smalti.presets import parse_overrides, preset_config
from smalti.training.batches import BatchSource
from smalti.training.config import RunConfig
from smalti.training.device import resolve_device
from smalti.training.distributed import Parallel
from smalti.training.ema import EMA, default_decay
from smalti.training.guard import Guard
from smalti.training.optim import build_optimizer
from smalti.training.state import TrainState
from smalti.training.validation import Triples, make_triples
from smalti.workflows.quality import QualityCheck, prepare_quality
from smalti.world import World


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


def prepare_run(config: RunConfig, me: World | None = None) -> tuple[Run, BackboneConfig]:
    """Load the images and settle everything that stays the same; nothing is written.

    The first process loads them first: of images that are new to it, it makes a list that the others then find.

    Raises:
        SmaltiError: settings, images or the two together do not fit, or another process says so.
    """
    me = World() if me is None else me
    device = me.device(resolve_device(config.device))
    found: list[_Alone] = []
    Together(me).step(lambda: found.append(_prepare_alone(config, me, device)), lambda answers: None)
    model, examples, codec, parts, batches, triples = found[0]
    quality = prepare_quality(config.quality, examples, codec, parts.train, config.seed, device, me)
    parallel = Parallel.prepare(config.parallel, me, device, config.precision)
    return Run(config, device, examples, codec, parts, batches.schedule, batches, triples, quality, parallel), model


class _Alone(NamedTuple):
    """The part of a `Run` that a process prepares by itself."""

    model: BackboneConfig
    examples: Examples
    codec: Codec
    split: Split
    batches: BatchSource
    triples: Triples | None


def _prepare_alone(config: RunConfig, me: World, device: torch.device) -> _Alone:
    if config.parallel.compile and config.stochastic_depth:
        raise ConfigError("compiled blocks do not see the hooks of stochastic_depth: set it to 0, or leave compile out")
    data = config.data
    load = partial(
        load_examples, data.path, data.image_size, posterior=data.posterior, skip_unreadable=data.skip_unreadable
    )
    examples = me.after_first(load, "examples")
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
    if config.store.keep_best and not (triples and config.validate_every):
        raise ConfigError(
            "store.keep_best goes by the validation loss: it needs validate_every and data.validation_fraction above 0"
        )
    # Opened before the first step, so that it is not found missing at the first picture.
    codec = codec_of(examples.codec, device=device) if config.sample_every or config.quality.every else PixelCodec()
    return _Alone(model, examples, codec, parts, batches, triples)


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


def model_extra(run: Run, step: int) -> dict[str, Any]:
    """What a finished model must know to be sampled from: what it predicts, on which schedule, and its classes."""
    return {
        "objective": to_dict(run.config.objective),
        "class_names": list(run.catalogue.class_names) if run.batches.conditional else [],
        "codec": to_dict(run.examples.codec),
        "value_range": [-1, 1],
        "trained": {"data": run.config.data.path, "fingerprint": run.catalogue.fingerprint, "steps": step},
    }
