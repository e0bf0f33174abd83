"""What is evaluated and what it is compared with: runs to draw from, images that exist, statistics of real ones."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from smalti.data import to_uint8
from smalti.data.sources import ImageSource, open_images
from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureNetwork
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.protocol import Reference, sampling_facts
from smalti.evaluation.reference import Statistics, holds, read_statistics
from smalti.evaluation.results import Source as ResultSource
from smalti.models import InferenceMode
from smalti.models.files import CONFIG as MODEL_CONFIG
from smalti.sampling import SamplingConfig
from smalti.sampling.record import RECORD, read_record
from smalti.training.config import RunConfig
from smalti.workflows.run_folder import CONFIG, load_config
from smalti.workflows.sample import load_source, read_classes, sample

PAPER_IMAGES = 50_000
MOST_TRAINING_IMAGES = 100_000  # looked at unasked
ROWS = 64

OnStep = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the images of a run are drawn; of no meaning for images that exist.

    Args:
        images: how many; the papers' FID-50K takes 50,000.
        label_rule: random (uniform, from each seed, as in the papers) or balanced (every class equally often).
        first_seed: image i has the seed first_seed + i.
        micro_batch, precision, inference: as in `smalti sample`.
        sampling: the default is the papers' 250 ancestral steps without guidance.
    """

    images: int = PAPER_IMAGES
    label_rule: Annotated[Literal["random", "balanced"], tyro.conf.arg(name="labels")] = "random"
    first_seed: int = 0
    micro_batch: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    inference: Literal["none"] | InferenceMode = "none"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.images < 2 or self.micro_batch < 1 or self.first_seed < 0:
            raise ConfigError("images must be at least 2, micro_batch at least 1 and first_seed 0 or more")


@dataclass(frozen=True, eq=False)
class MeasuredImages:
    """Images to be measured: what is known of them, and a way to any stretch of them."""

    source: ResultSource
    count: int
    unit: int  # stretches start at multiples of it
    known: Mapping[str, Any]  # fields of the protocol
    read: Callable[[range, OnStep], Iterator[Tensor]]
    home: Path  # where results about them belong
    run: Path | None = None


@dataclass(frozen=True, eq=False)
class RealImages:
    """What images are compared with: images, statistics of images, or both."""

    reference: Reference
    images: ImageSource | None
    statistics: Statistics | None


def is_model(path: Path) -> bool:
    """Whether this is a run folder or a model folder, and not a folder of images."""
    return (path / "model" / MODEL_CONFIG).is_file() or (path / MODEL_CONFIG).is_file() or (path / CONFIG).is_file()


def open_measured(source: str, drawing: Drawing, device: torch.device, options: Mapping[str, Any]) -> MeasuredImages:
    """Images to be measured: those that a run draws, or those of a set, a folder or a file.

    Raises:
        SmaltiError: there is nothing of that name, or it cannot be measured.
    """
    path = Path(source)
    return _run_images(path, drawing, device) if is_model(path) else _file_images(source, options)


def _run_images(run: Path, drawing: Drawing, device: torch.device) -> MeasuredImages:
    source = load_source(run, device)
    if source.config.in_channels != 3:
        raise ConfigError(f"{run} has {source.config.in_channels} channels; only RGB images can be measured")
    seeds = range(drawing.first_seed, drawing.first_seed + drawing.images)
    labels = read_classes(source, (), len(seeds), seeds, otherwise=drawing.label_rule)
    facts = {"kind": source.config.kind, "weights": source.weights, "steps": source.steps}
    if drawing.inference != "none":
        source = source.for_inference(drawing.inference, drawing.precision)

    def read(indices: range, on_step: OnStep) -> Iterator[Tensor]:
        chosen = None if labels is None else [labels[i] for i in indices]
        batches = sample(
            source,
            [seeds[i] for i in indices],
            chosen,
            drawing.sampling,
            micro_batch=drawing.micro_batch,
            device=device,
            precision=drawing.precision,
            on_step=lambda done, total, _: on_step(f"sampler step {done} of {total}"),
        )
        return (to_uint8(batch.images) for batch in batches)

    known = {
        "image_size": source.config.sample_size,
        "class_labels": drawing.label_rule if labels is not None else "unconditional",
        "sampling": sampling_facts(
            drawing.sampling,
            flow=source.objective.schedule == "flow",
            learned_variance=source.config.learned_variance,
        ),
        "ema": _averaged(source.weights),
        "precision": drawing.precision,
        "inference": drawing.inference,
        "decoder": "pixels",
    }
    named = ResultSource(name=run.resolve().name, path=str(run), model=facts)
    return MeasuredImages(named, len(seeds), drawing.micro_batch, known, read, run / "evaluation", run)


def _file_images(source: str, options: Mapping[str, Any]) -> MeasuredImages:
    images = open_images(source, **options)
    known: dict[str, Any] = {"image_size": images.image_size, "real": images.real}
    facts: dict[str, Any] = {}
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    if (folder / RECORD).is_file():
        known, facts = _recorded(folder, images.count, known)
    for what in images.notes:
        note(f"{source}: {what}")
    named = ResultSource(name=images.name, path=source, model=facts)

    def read(indices: range, on_step: OnStep) -> Iterator[Tensor]:
        return images.batches(ROWS, indices=indices)

    home = Path(source) / "evaluation" if Path(source).is_dir() else Path("evaluation")
    return MeasuredImages(named, images.count, ROWS, known, read, home)


def _recorded(folder: Path, count: int, known: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the record of `smalti sample` adds to the protocol, and to the facts about the model."""
    record = read_record(folder)
    made, model = record.identity, record.model
    if not record.complete or count != made.count:
        raise DataError(
            f"{folder} is a set of {made.count} samples, {count} of them are there; finish it with the command that "
            "started it, or remove its sample.json to measure what is there as images of unknown origin"
        )
    rule = "unconditional" if made.label_rule.rule == "none" else made.label_rule.rule
    known = known | {
        "class_labels": rule,
        "sampling": sampling_facts(
            made.sampling, flow=model.schedule == "flow", learned_variance=model.learned_variance
        ),
        "ema": _averaged(model.weights),
        "precision": made.precision,
        "inference": made.inference,
        "decoder": "pixels",
    }
    return known, {"kind": model.kind, "weights": model.weights, "steps": model.steps, "path": model.path}


def _averaged(weights: str) -> bool | None:
    """Whether these are moving averages; None where nobody knows."""
    return None if weights == "unknown" else weights == "ema"


def open_training(run: Path | None, training: str | None, options: Mapping[str, Any]) -> list[ImageSource]:
    """Images to look for copies of and, where they are known, real images that training never saw."""
    if training == "none" or (training is None and run is None):
        return []
    if training is not None:
        return [open_images(training, **options)]
    config = _trained_on(run) if run is not None else None
    if config is None:
        return []
    parts = ("train", "validation") if config.data.validation_fraction else ("train",)
    found = [open_images(_part(config, part), image_size=config.data.image_size) for part in parts]
    if found[0].count > MOST_TRAINING_IMAGES:
        note(
            f"{found[0].count} training images are many, copies of them are not looked for; "
            f"--training {config.data.path} does it anyway"
        )
        return []
    return found


def _trained_on(run: Path) -> RunConfig | None:
    """The settings of the training run, if this is its folder."""
    return load_config(run / CONFIG) if (run / CONFIG).is_file() else None


def _part(config: RunConfig, part: str) -> str:
    """How `open_images` calls the images that a run trained on, or those that it set aside."""
    fraction = config.data.validation_fraction
    return f"{config.data.path}#{part},seed={config.seed},fraction={fraction}" if fraction else config.data.path


def kinds_of_ours(names: Sequence[str], network: FeatureNetwork) -> set[str]:
    """Features that these metrics need of our images.

    Raises:
        ConfigError: the network does not make them.
    """
    for name in names:
        if missing := set(METRICS[name].needs) - set(network.widths):
            raise ConfigError(
                f"{name} needs {', '.join(sorted(missing))} features, which {network.identity.name} does not make; "
                "choose other metrics with --metrics"
            )
    return {kind for name in names for kind in METRICS[name].needs}


def kinds_of_reference(names: Sequence[str]) -> set[str]:
    """Features that these metrics need of real images."""
    return {kind for name in names if METRICS[name].reference != "nothing" for kind in METRICS[name].needs}


def open_real(
    asked: str | None, run: Path | None, names: Sequence[str], network: FeatureNetwork, options: Mapping[str, Any]
) -> RealImages | None:
    """What the images are compared with, checked for what the metrics need of it."""
    comparing = [name for name in names if METRICS[name].reference != "nothing"]
    if asked is None:
        config = _trained_on(run) if run is not None else None
        if config is None:
            if comparing:
                raise ConfigError(
                    f"{', '.join(comparing)} compare with real images: give --reference, an image set, a folder, an "
                    ".npz of images or of statistics"
                )
            return None
        trained = open_images(_part(config, "train"), image_size=config.data.image_size)
        return RealImages(Reference(trained.name, trained.fingerprint, trained.count), trained, None)
    statistics: Statistics | None = None
    images: ImageSource | None = None
    held = holds(Path(asked)) if Path(asked).is_file() else "images"
    if held != "images":
        statistics = read_statistics(Path(asked), network.identity, network.widths)
    if held != "statistics":
        images = open_images(asked, **options)
    for name in comparing:
        metric = METRICS[name]
        stated = statistics.moments if statistics is not None else {}
        if images is None and (metric.reference == "features" or not set(metric.needs) <= set(stated)):
            raise DataError(
                f"{asked} has statistics of {', '.join(stated) or 'nothing'} and no images; {name} needs "
                + ("the images" if metric.reference == "features" else f"those of {', '.join(metric.needs)}")
                + ": give images, or leave it out with --metrics"
            )
    if statistics is not None:
        return RealImages(Reference(statistics.name, statistics.digest, statistics.count), images, statistics)
    assert images is not None
    return RealImages(Reference(images.name, images.fingerprint, images.count), images, None)


def note(text: str) -> None:
    """One line for a person, beside whatever a program reads."""
    print(text, file=sys.stderr)
