"""What is evaluated and what it is compared with: runs to draw from, images that exist, statistics of real ones."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from smalti.data import to_uint8
from smalti.data.sets import BUILT_IN
from smalti.data.sources import ImageSource, open_images
from smalti.errors import ConfigError, DataError, NumericError
from smalti.evaluation.features import FeatureNetwork
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.protocol import Reference, sampling_facts
from smalti.evaluation.reference import Statistics, holds, read_statistics
from smalti.evaluation.results import Source as ResultSource
from smalti.models.files import CONFIG as MODEL_CONFIG
from smalti.sampling import SamplingConfig
from smalti.sampling.record import RECORD, read_record
from smalti.training.config import RunConfig
from smalti.workflows.progress import ProgressReport
from smalti.workflows.run_folder import CONFIG
from smalti.workflows.sample import MOST_IMAGES, load_source, read_classes, require_images, sample
from smalti.workflows.trained_on import part_of, trained_on
from smalti.world import World

PAPER_IMAGES = 50_000
MOST_TRAINING_IMAGES = 100_000  # looked at unasked
ROWS = 64
_MANY_FILES = 2000  # from which on looking at their heads takes seconds

OnStep = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the images of runs are drawn; of no meaning for images that exist."""

    images: int = PAPER_IMAGES
    """How many a run draws; the papers' FID-50K takes 50,000."""
    label_rule: Annotated[Literal["random", "balanced"], tyro.conf.arg(name="labels")] = "random"
    """Classes of what a run draws: uniform at random, as in the papers, or every class equally often."""
    first_seed: int = 0
    """Image i of a run has the seed first_seed + i."""
    micro_batch: int = 16
    """Images that a run draws at once; part of what makes the bits."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """As in `smalti sample`: bf16 is faster on GPUs and on CPUs with bf16 units; part of the protocol."""
    inference: Literal["none", "eager", "frozen"] = "none"
    """As in `smalti sample`: as trained, merged for speed, or compiled as well; part of the protocol."""
    codec: str = ""
    """As in `smalti sample`: the autoencoder of runs on latents; part of the protocol. Left out: where it lay."""
    other_decoder: bool = False
    """As in `smalti sample`: accept a --codec with the same encoder and another decoder."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How runs are drawn from. The default is the papers': 250 ancestral steps without guidance."""

    def __post_init__(self) -> None:
        for name, value, least in (("images", self.images, 2), ("micro_batch", self.micro_batch, 1),
                                   ("first_seed", self.first_seed, 0)):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if self.images > MOST_IMAGES:
            raise ConfigError(f"images must be at most {MOST_IMAGES:,}, got {self.images:,}")

    @property
    def changed(self) -> list[str]:
        """Flags that are not at their defaults."""
        plain = Drawing()
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        called = {"label_rule": "--labels", "sampling": "--sampling.*"}
        return [called.get(name, f"--{name.replace('_', '-')}") for name in names]


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
    if path.name == "model" and (path.parent / CONFIG).is_file():
        path = path.parent  # the run knows what it was trained on, its model folder does not
    return _run_images(path, drawing, device) if is_model(path) else _file_images(source, options)


def check_there(spec: str, flag: str = "") -> None:
    """Refuse what does not exist, before anything takes time.

    Args:
        flag: that it was given for; "" = a source.

    Raises:
        DataError: nothing has this name, or it is a folder of runs.
    """
    path, _, part = spec.rpartition("#")
    name = spec if Path(spec).exists() or not part or not path else path
    if name not in BUILT_IN and not Path(name).exists():
        runs = "" if flag else "a run or model folder, "
        raise DataError(
            f"{flag + ' ' if flag else ''}{spec} does not exist; give {runs}a folder of images, an image set "
            f"({', '.join(BUILT_IN)}) or an .npz"
        )
    if is_model(Path(name)):
        if flag:
            raise DataError(f"{flag} {spec} is a run, and real images are needed here: a folder, an image set or .npz")
    elif Path(name).is_dir() and (runs_inside := _models_in(Path(name))):
        raise DataError(f"{spec} is a folder of runs; name those that you mean: {' '.join(runs_inside)}")


def _models_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.path for entry in entries if entry.is_dir() and is_model(Path(entry)))


def open_existing(spec: str, what: str, options: Mapping[str, Any]) -> ImageSource:
    """`open_images` with progress, and with the part that the images have in what goes wrong.

    Args:
        what: stands before the error, as in "--reference"; "" = nothing.
    """
    with ExitStack() as shown:
        report: list[ProgressReport] = []

        def progress(done: int, total: int) -> None:
            if total < _MANY_FILES or not is_first_process():
                return
            if not report:
                report.append(shown.enter_context(ProgressReport(f"finding images in {spec}", total, unit="files")))
            report[0].update(done)

        try:
            return open_images(spec, progress=progress, **options)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{what} {error}" if what else str(error)) from error


def _run_images(run: Path, drawing: Drawing, device: torch.device) -> MeasuredImages:
    source = load_source(run, device, codec=drawing.codec, other_decoder=drawing.other_decoder)
    require_images(source, run)
    seeds = range(drawing.first_seed, drawing.first_seed + drawing.images)
    labels = read_classes(source, (), len(seeds), seeds, otherwise=drawing.label_rule)
    facts = {"kind": source.config.kind, "weights": source.weights, "steps": source.steps}
    # Says now what is wrong with the sampling settings; nothing is drawn before the first image is asked for.
    sample(source, seeds[:1], labels and labels[:1], drawing.sampling, micro_batch=drawing.micro_batch, device=device)
    if drawing.inference != "none":
        source = source.for_inference(drawing.inference, drawing.precision)

    steps = drawing.sampling.num_inference_steps

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
            on_step=lambda done, total, _: on_step(f"sampler step {(done - 1) % steps + 1} of {steps}"),
        )
        return (to_uint8(_finite(batch.images, batch.seeds)) for batch in batches)

    known = {"image_size": source.image_size} | _drawn(
        drawing.label_rule if labels is not None else "unconditional",
        drawing.sampling,
        schedule=source.objective.schedule,
        learned_variance=source.config.learned_variance,
        weights=source.weights,
        precision=drawing.precision,
        inference=drawing.inference,
        decoder=source.decoder,
    )
    named = ResultSource(name=run.resolve().name, path=str(run), model=facts)
    return MeasuredImages(named, len(seeds), drawing.micro_batch, known, read, run / "evaluation", run)


def _finite(images: Tensor, seeds: Sequence[int]) -> Tensor:
    if not bool(torch.isfinite(images).all()):
        raise NumericError(
            f"the samples of seeds {seeds[0]} to {seeds[-1]} have values that are not finite, and are not measured; "
            "check the model, or try --precision fp32 and a smaller guidance scale"
        )
    return images


def _file_images(source: str, options: Mapping[str, Any]) -> MeasuredImages:
    images = open_existing(source, "", options)
    # Reads a file to its end: blocks of it are read without their checksum, and damage would be measured, too.
    _ = images.fingerprint
    known: dict[str, Any] = {"image_size": images.image_size, "real": images.real}
    facts: dict[str, Any] = {}
    path = Path(source if Path(source).exists() else source.rpartition("#")[0])
    folder = path if path.is_dir() else path.parent
    if (folder / RECORD).is_file():
        known, facts = _recorded(folder, images.count, known)
    for what in images.notes:
        note(f"{source}: {what}")
    named = ResultSource(name=images.name, path=source, model=facts)

    def read(indices: range, on_step: OnStep) -> Iterator[Tensor]:
        return images.batches(ROWS, indices=indices)

    home = Path("evaluation") if source.partition("#")[0] in BUILT_IN else folder / "evaluation"
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
    known = known | _drawn(
        "unconditional" if made.label_rule.rule == "none" else made.label_rule.rule,
        made.sampling,
        schedule=model.schedule,
        learned_variance=model.learned_variance,
        weights=model.weights,
        precision=made.precision,
        inference=made.inference,
        decoder=made.decoder,
    )
    return known, {"kind": model.kind, "weights": model.weights, "steps": model.steps, "path": model.path}


def _drawn(
    class_labels: str,
    sampling: SamplingConfig,
    *,
    schedule: str,
    learned_variance: bool,
    weights: str,
    precision: str,
    inference: str,
    decoder: str,
) -> dict[str, Any]:
    """What a protocol holds of images that a model drew, now or earlier."""
    return {
        "class_labels": class_labels,
        "sampling": sampling_facts(sampling, flow=schedule == "flow", learned_variance=learned_variance),
        "ema": None if weights == "unknown" else weights == "ema",
        "precision": precision,
        "inference": inference,
        "decoder": decoder,
    }


def open_training(run: Path | None, training: str | None, options: Mapping[str, Any]) -> list[ImageSource]:
    """Images to look for copies of and, where they are known, real images that training never saw."""
    if training == "none" or (training is None and run is None):
        return []
    if training is not None:
        return [open_existing(training, "--training", options)]
    config = trained_on(run) if run is not None else None
    if config is None:
        return []
    parts = ("train", "validation") if config.data.validation_fraction else ("train",)
    assert run is not None
    found = [_trained_images(run, config, part, "--training none, or --training IMAGES") for part in parts]
    if found[0].count > MOST_TRAINING_IMAGES:
        note(
            f"{found[0].count:,} training images are many, copies of them are not looked for; "
            f"--training {config.data.path} does it anyway"
        )
        return []
    return found


def _trained_images(run: Path, config: RunConfig, part: str, otherwise: str) -> ImageSource:
    """Images that a run trained on, or those that it set aside, from where its settings say they are."""
    data = config.data.path
    if data not in BUILT_IN and not Path(data).exists():
        here = "" if Path(data).is_absolute() else f" seen from {Path.cwd()}; start where the training started"
        raise DataError(f"{run} was trained on {data}, which does not exist{here}, or give {otherwise}")
    try:
        return open_existing(part_of(config, part), "", {"image_size": config.data.image_size})
    except DataError as error:
        raise DataError(f"{run} was trained on {data}, which can no longer be read: {error}; or give {otherwise}"
                        ) from error  # fmt: skip


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
        config = trained_on(run) if run is not None else None
        if config is None:
            if comparing:
                raise ConfigError(
                    f"{', '.join(comparing)} compare with real images: give --reference, an image set, a folder, an "
                    ".npz of images or of statistics"
                )
            return None
        assert run is not None
        trained = _trained_images(run, config, "train", "--reference REAL-IMAGES")
        return RealImages(Reference(trained.name, trained.fingerprint, trained.count), trained, None)
    statistics: Statistics | None = None
    images: ImageSource | None = None
    held = holds(Path(asked)) if Path(asked).is_file() else "images"
    if held != "images":
        statistics = read_statistics(Path(asked), network.identity, network.widths)
    if held != "statistics":
        images = open_existing(asked, "--reference", options)
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


def is_first_process() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return World.launched().rank == 0


def note(text: str) -> None:
    """One line for a person, beside whatever a program reads; once, however many processes there are."""
    if is_first_process():
        print(text, file=sys.stderr)
