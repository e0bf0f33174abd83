"""`demo`: train a small DiT on the shipped emoji within a time budget, and write a page that shows what it learned."""

import itertools
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from smalti import __version__
from smalti.config import to_dict
from smalti.data import load_image_set, split
from smalti.data.pixels import read_images
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import ConfigError
from smalti.models import config_of
from smalti.report.files import write_text
from smalti.report.images import data_url, first_columns, save_grid
from smalti.report.page import ClassRow, Nearness, RunPage, Snapshot, render
from smalti.sampling import SamplingConfig
from smalti.training.config import DataConfig, OptimizerConfig, RunConfig
from smalti.training.device import resolve_device
from smalti.training.log import read_log
from smalti.training.loop import train_steps
from smalti.workflows.progress import ProgressReport
from smalti.workflows.run_folder import CONFIG, changes, load_config
from smalti.workflows.sample import Source, sample
from smalti.workflows.train import PREVIEW_COLUMNS, TrainResult, new_state, prepare_run, train

SAMPLES_PER_CLASS = 10
TRAINING_SHARE = 0.83  # of the budget; the rest is validation, previews, the final samples and the page
TIMED_STEPS = 4
VALIDATIONS, SNAPSHOTS = 12, 6
SHORT_MINUTES = 4.0
MEASURED = ("steps", "precision", "validate_every", "sample_every", "checkpoint_every")


def recipe(out: Path, seed: int) -> RunConfig:
    """The demo's settings but for the number of steps and the precision; see docs/demo.md for how they were found."""
    return RunConfig(
        out=out,
        model="dit-emoji32",
        data=DataConfig(path="emoji32"),
        objective=ObjectiveConfig(
            schedule="flow",
            prediction="velocity",
            timestep_sampling="logit_normal",
            logit_mean=0.6,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, decay="cosine", clip_norm=1.0
        ),
        batch_size=32,
        seed=seed,
        preview=SamplingConfig(sampler="dpm-solver++", num_inference_steps=20, guidance_scale=2.0, clip_x0=True),
    )


def demo(out: Path, *, minutes: float, seed: int) -> Path:
    """Run or continue the demo; returns the path of the page.

    Args:
        minutes: budget on this machine; the number of steps is chosen from a measurement at the first start.

    Raises:
        SmaltiError: what the user can mend; PreemptedError when stopped, after saving.
    """
    started = time.monotonic()
    config = _continued(out, seed) if (out / CONFIG).exists() else _fit_to(minutes, recipe(out, seed))
    result = train(config)
    page = _page(config, result, time.monotonic() - started)
    path = out / "index.html"
    write_text(path, render(page))
    return path


def _continued(out: Path, seed: int) -> RunConfig:
    """The settings of a demo that was begun: the recipe, but for what its first start measured."""
    stored = replace(load_config(out / CONFIG), out=out)
    other = {name: text for name, text in changes(stored, recipe(out, seed)).items() if name not in MEASURED}
    if other:
        listed = "; ".join(f"{name}: {text}" for name, text in other.items())
        raise ConfigError(f"{out} holds another run ({listed}); choose another --out")
    return stored


def _fit_to(minutes: float, config: RunConfig) -> RunConfig:
    """Choose precision and steps by timing a few steps of a throw-away state in both precisions."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    seconds = {
        precision: _time_steps(replace(config, precision=precision, steps=TIMED_STEPS)) for precision in precisions
    }
    best = min(precisions, key=seconds.__getitem__)
    steps = max(60, int(minutes * 60 * TRAINING_SHARE / seconds[best]))
    with ProgressReport("measuring", 1) as progress:
        progress.note(
            f"a step takes {seconds['fp32']:.2f} s in fp32, {seconds['bf16']:.2f} s in bf16: "
            f"{steps} steps in {best} for a budget of {minutes:g} minutes"
        )
    # Looking takes as long in a short run as in a long one, so a short one looks less often.
    validations, snapshots = (VALIDATIONS, SNAPSHOTS) if minutes >= SHORT_MINUTES else (4, 2)
    return replace(
        config,
        steps=steps,
        precision=best,
        validate_every=-(-steps // validations),
        sample_every=-(-steps // snapshots),
        checkpoint_every=max(20, -(-steps // 12)),
    )


def _time_steps(config: RunConfig) -> float:
    run, model = prepare_run(config)
    marks = [time.perf_counter()]
    for _ in train_steps(new_state(run, model), run.batches, config):
        marks.append(time.perf_counter())
    pauses = sorted(b - a for a, b in itertools.pairwise(marks[1:]))  # the first step warms up
    return pauses[len(pauses) // 2]


def _page(config: RunConfig, result: TrainResult, seconds: float) -> RunPage:
    assert result.validation is not None
    assert result.baselines is not None
    log = read_log(config.out)
    training = [(e["step"], e["loss"]) for e in log if e["event"] == "train" and e["loss"] is not None]
    validation = [(e["step"], e["loss"]) for e in log if e["event"] == "validation"]
    minutes = (
        sum(config.log_every * config.batch_size / e["images_per_second"] for e in log if e["event"] == "train") / 60
    )
    rows, nearness = _samples(config, result)
    loss, lines = result.validation, result.baselines
    numbers = {
        "validation": loss.mean,
        "strata": list(loss.strata),
        "constant": lines.constant.mean,
        "constant_strata": list(lines.constant.strata),
        "linear": lines.linear.mean,
        "linear_strata": list(lines.linear.strata),
        "steps": config.steps,
        "training_minutes": minutes,
        "nearness": vars(nearness),
    }
    write_text(config.out / "result.json", json.dumps(numbers, indent=1) + "\n")
    parameters = sum(p.numel() for p in result.model.parameters())
    below = sum(ours < line for ours, line in zip(loss.strata, lines.linear.strata, strict=True))
    verdict = (
        f"Validation loss {loss.mean:.4f}; the best linear denoiser reaches {lines.linear.mean:.4f}, "
        f"the mean image {lines.constant.mean:.4f}. "
        + (
            f"The network is below the linear line, and in {below} of 8 noise ranges taken alone."
            if loss.mean < lines.linear.mean
            else "The network is not below the linear line yet: so far it has learned a filter."
        )
    )
    return RunPage(
        title="smalti: what a small DiT learned",
        lead=(
            "A class-conditional diffusion transformer, trained from nothing on 32x32 emoji "
            "(Noto Emoji, Apache-2.0) by `smalti demo`."
        ),
        verdict=verdict,
        facts=[
            (f"{minutes:.1f} min", "of training"),
            (f"{config.steps:,}", f"steps of {config.batch_size} images"),
            (f"{parameters / 1e6:.1f} M", "parameters"),
            (config.precision, f"on {_machine(config)}"),
        ],
        rows=rows,
        snapshots=_snapshots(config, rows[0].samples.shape[-1]),
        training=training,
        validation=validation,
        constant=lines.constant.mean,
        linear=lines.linear.mean,
        strata=loss.strata,
        constant_strata=lines.constant.strata,
        linear_strata=lines.linear.strata,
        nearness=nearness,
        settings=_settings(config, result, seconds),
    )


def _samples(config: RunConfig, result: TrainResult) -> tuple[list[ClassRow], Nearness]:
    images = load_image_set(config.data.path, config.data.image_size)
    parts = split(images, config.data.validation_fraction, config.seed)
    train_images, held_out = (read_images(images, part) for part in (parts.train, parts.validation))
    source = Source(result.model, config.objective, images.class_names)
    labels = [k for k in range(len(images.class_names)) for _ in range(SAMPLES_PER_CLASS)]
    device = resolve_device(config.device)
    with ProgressReport("sampling", -(-len(labels) // 30) * config.preview.num_inference_steps) as progress:
        batches = sample(
            source,
            range(len(labels)),
            labels,
            config.preview,
            micro_batch=30,
            device=device,
            precision=config.precision,
            on_step=lambda done, total, _: progress.update(done),
        )
        samples = torch.cat([batch.images for batch in batches])
    save_grid(samples, config.out / "samples" / "classes.png", columns=SAMPLES_PER_CLASS)
    distances, nearest = _nearest(samples, train_images)
    held_out_distances, _ = _nearest(held_out, train_images)
    nearness = Nearness(
        samples=distances.median().item(),
        held_out=held_out_distances.median().item(),
        copies=int((distances < held_out_distances.quantile(0.1)).sum()),
        count=len(samples),
    )
    rows = [
        ClassRow(name, own, train_images[near])
        for name, own, near in zip(
            images.class_names, samples.split(SAMPLES_PER_CLASS), nearest.split(SAMPLES_PER_CLASS), strict=True
        )
    ]
    return rows, nearness


def _nearest(images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square distance per pixel in grey levels to the nearest of the others, and which one it is."""
    a, b = images.clamp(-1, 1).flatten(1), others.flatten(1)
    distances, indices = torch.cdist(a, b).min(dim=1)
    return distances / a.shape[1] ** 0.5 * 127.5, indices


def _snapshots(config: RunConfig, width: int) -> list[Snapshot]:
    """The run's previews, two samples a class, so that six of them fit beside each other."""
    snapshots = []
    for path in sorted((config.out / "samples").glob("step-*.png")):
        with Image.open(path) as sheet:
            part = first_columns(sheet, 2, of=PREVIEW_COLUMNS, width=width)
        snapshots.append(Snapshot(f"step {int(path.stem.removeprefix('step-')):,}", data_url(part)))
    return snapshots


def _settings(config: RunConfig, result: TrainResult, seconds: float) -> Sequence[tuple[str, str]]:
    sampling = config.preview
    return [
        ("command", f"smalti demo --out {config.out}"),
        ("network", f"{config.model}: {json.dumps(to_dict(config_of(result.model)))}"),
        ("objective", json.dumps(to_dict(config.objective))),
        ("optimizer", json.dumps(to_dict(config.optimizer))),
        ("averaging", f"EMA, decay {result.ema_decay:.5f}"),
        ("sampler", f"{sampling.sampler}, {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}"),
        ("data", f"{config.data.path}, {config.data.validation_fraction:g} of the names held out, seed {config.seed}"),
        ("this call took", f"{seconds / 60:.1f} minutes, set-up aside"),
        ("machine", f"{platform.machine()} {platform.system()}, {_machine(config)}"),
        ("versions", f"smalti {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
    ]


def _machine(config: RunConfig) -> str:
    device = resolve_device(config.device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)
