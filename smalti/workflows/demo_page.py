"""What the demo shows of its finished runs: samples, nearness to the training images, losses, cost."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from smalti import __version__
from smalti.config import to_dict
from smalti.cost.macs import count_macs, count_parameters
from smalti.data import load_image_set, split, to_uint8
from smalti.data.pixels import read_images
from smalti.evaluation.memorisation import pixel_distances
from smalti.models import config_of
from smalti.report.images import data_url, first_of_rows, save_grid
from smalti.report.page import ComparisonPage, Nearness, NetworkRun, Snapshot
from smalti.training.config import RunConfig
from smalti.training.device import resolve_device
from smalti.training.log import read_log
from smalti.workflows.demo_quality import DemoQuality
from smalti.workflows.progress import ProgressReport
from smalti.workflows.sample import Source, sample
from smalti.workflows.train import TrainResult
from smalti.workflows.train_looks import PREVIEW_COLUMNS

SAMPLES_PER_CLASS = 4
NAMES = {"dit": "DiT", "diffussm": "DiffuSSM", "drwkv": "Diffusion-RWKV", "udit": "U-DiT"}
COUNTS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True, eq=False)
class Pictured:
    """The page, and its numbers for machines."""

    page: ComparisonPage
    numbers: dict[str, Any]


def build_page(
    results: Sequence[tuple[RunConfig, TrainResult]],
    megabytes: Mapping[str, float],
    quality: DemoQuality,
    started: float,
) -> Pictured:
    """Draw samples from every finished run and put everything together.

    Args:
        megabytes: that a training step needs, by kind of network, where it could be measured.
        started: when the demo began, on the monotonic clock.
    """
    config, first = results[0]
    assert first.baselines is not None
    lines = first.baselines
    images = load_image_set(config.data.path, config.data.image_size)
    parts = split(images, config.data.validation_fraction, config.seed)
    train_images, held_out = (read_images(images, part) for part in (parts.train, parts.validation))
    runs, numbers = [], {}
    for run_config, result in results:
        kind = config_of(result.model).kind
        run, row = _network(run_config, result, images.class_names, train_images, held_out, megabytes.get(kind))
        runs.append(run)
        numbers[kind] = row
    page = ComparisonPage(
        title=f"smalti: {COUNTS[len(runs)]} backbone{'s' if len(runs) > 1 else ''}, one budget",
        lead=(
            "Class-conditional diffusion models, trained from nothing on 32x32 emoji (Noto Emoji, Apache-2.0) by "
            "`smalti demo`: the same images in the same order, the same noise, the same number of steps, and networks "
            "of equal multiply-adds."
        ),
        verdict=_verdict(numbers, lines.linear.mean, lines.constant.mean),
        facts=[
            (f"{sum(row['training_minutes'] for row in numbers.values()):.1f} min", "of training in all"),
            (f"{config.steps:,}", f"steps of {config.batch_size} images each"),
            (config.precision, f"on {_machine(config)}"),
        ],
        class_names=images.class_names,
        networks=runs,
        constant=lines.constant.mean,
        linear=lines.linear.mean,
        constant_strata=lines.constant.strata,
        linear_strata=lines.linear.strata,
        settings=_settings(results, time.monotonic() - started),
        quality=quality.shown,
    )
    return Pictured(
        page,
        {
            "steps": config.steps,
            "precision": config.precision,
            "constant": lines.constant.mean,
            "constant_strata": list(lines.constant.strata),
            "linear": lines.linear.mean,
            "linear_strata": list(lines.linear.strata),
            "networks": numbers,
            "quality": quality.numbers,
        },
    )


def _verdict(numbers: Mapping[str, Mapping[str, Any]], linear: float, constant: float) -> list[str]:
    below = [NAMES[kind] for kind, row in numbers.items() if row["validation"] < linear]
    who = "All" if len(below) == len(numbers) else ", ".join(below) or "None"
    sentences = [
        f"Validation loss of the mean image {constant:.4f}, of the best linear denoiser {linear:.4f}. "
        + (f"Below the linear line: {who.lower()}." if below != list(numbers) else f"{who} are below the linear line.")
    ]
    if len(numbers) > 1:
        sentences.append(
            "This ranks nothing: one seed, one recipe, one small data set, and minutes of training. Differences of the "
            "size seen here come and go with the seed; docs/numbers.md shows three seeds of a shorter run."
        )
    return sentences


def _network(
    config: RunConfig,
    result: TrainResult,
    class_names: Sequence[str],
    train_images: Tensor,
    held_out: Tensor,
    megabytes: float | None,
) -> tuple[NetworkRun, dict[str, Any]]:
    assert result.validation is not None
    log = read_log(config.out)
    speeds = [e["images_per_second"] for e in log if e["event"] == "train"]
    minutes = sum(config.log_every * config.batch_size / speed for speed in speeds) / 60
    model = config_of(result.model)
    samples = _samples(config, result, class_names)
    seen = to_uint8(train_images)
    distances, nearest = pixel_distances(to_uint8(samples), seen)
    held_out_distances, _ = pixel_distances(to_uint8(held_out), seen)
    nearness = Nearness(
        samples=distances.median().item(),
        held_out=held_out_distances.median().item(),
        copies=int((distances < held_out_distances.quantile(0.1)).sum()),
        count=len(samples),
    )
    parameters = count_parameters(model).trained
    macs = count_macs(model, batch_size=config.batch_size).total
    seconds = 60 * minutes / config.steps
    cost = [
        ("parameters", f"{parameters / 1e6:.2f} M"),
        ("multiply-adds", f"{macs / 1e6:.1f} M"),
        ("a training step", f"{seconds:.2f} s"),
        ("its memory", f"{megabytes:.0f} MB" if megabytes is not None else "not measured"),
        ("images per second", f"{config.batch_size / seconds:.0f}"),
        ("training", f"{minutes:.1f} min"),
        ("validation loss", f"{result.validation.mean:.4f}"),
    ]
    run = NetworkRun(
        name=NAMES[model.kind],
        samples=samples.split(SAMPLES_PER_CLASS),
        nearest=train_images[nearest].split(SAMPLES_PER_CLASS),
        snapshots=_snapshots(config, samples.shape[-1]),
        validation=[(e["step"], e["loss"]) for e in log if e["event"] == "validation"],
        strata=result.validation.strata,
        cost=cost,
        nearness=nearness,
    )
    row = {
        "validation": result.validation.mean,
        "strata": list(result.validation.strata),
        "parameters": parameters,
        "macs": macs,
        "seconds_per_step": seconds,
        "step_megabytes": megabytes,
        "training_minutes": minutes,
        "nearness": vars(nearness),
    }
    return run, row


def _samples(config: RunConfig, result: TrainResult, class_names: Sequence[str]) -> Tensor:
    source = Source(result.model, config.objective, tuple(class_names))
    labels = [k for k in range(len(class_names)) for _ in range(SAMPLES_PER_CLASS)]
    with ProgressReport("sampling", -(-len(labels) // 18) * config.preview.num_inference_steps) as progress:
        batches = sample(
            source,
            range(len(labels)),
            labels,
            config.preview,
            micro_batch=18,
            device=resolve_device(config.device),
            precision=config.precision,
            on_step=lambda done, total, _: progress.update(done),
        )
        samples = torch.cat([batch.images for batch in batches])
    save_grid(samples, config.out / "samples" / "classes.png", columns=SAMPLES_PER_CLASS)
    return samples


def _snapshots(config: RunConfig, width: int) -> list[Snapshot]:
    """The run's previews, one sample a class, as one strip each."""
    snapshots = []
    for path in sorted((config.out / "samples").glob("step-*.png")):
        with Image.open(path) as sheet:
            part = first_of_rows(sheet, columns=PREVIEW_COLUMNS, width=width)
        snapshots.append(Snapshot(f"step {int(path.stem.removeprefix('step-')):,}", data_url(part)))
    return snapshots


def _settings(results: Sequence[tuple[RunConfig, TrainResult]], seconds: float) -> Sequence[tuple[str, str]]:
    config, first = results[0]
    sampling = config.preview
    return [
        ("command", f"smalti demo --out {config.out.parent}"),
        *(
            (f"network {NAMES[config_of(r.model).kind]}", f"{c.model}: {json.dumps(to_dict(config_of(r.model)))}")
            for c, r in results
        ),
        ("objective", json.dumps(to_dict(config.objective))),
        ("optimizer", json.dumps(to_dict(config.optimizer))),
        ("averaging", f"EMA, decay {first.ema_decay:.5f}"),
        ("sampler", f"{sampling.sampler}, {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}"),
        ("data", f"{config.data.path}, {config.data.validation_fraction:g} of the names held out, seed {config.seed}"),
        ("this call took", f"{seconds / 60:.1f} minutes, set-up aside"),
        ("machine", f"{platform.machine()} {platform.system()}, {_machine(config)}"),
        ("versions", f"smalti {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
    ]


def _machine(config: RunConfig) -> str:
    device = resolve_device(config.device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)
