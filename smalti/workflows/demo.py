"""`demo`: train the backbones on the shipped emoji under one budget, and write a page that shows them side by side."""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from smalti.config import from_dict
from smalti.cost.memory import peak_memory, peak_memory_refusal
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import ConfigError
from smalti.models import BACKBONES, config_of
from smalti.report.files import write_text
from smalti.report.page import render
from smalti.sampling import SamplingConfig
from smalti.training.config import DataConfig, OptimizerConfig, RunConfig
from smalti.training.loop import train_steps
from smalti.workflows.demo_page import NAMES, build_page
from smalti.workflows.demo_quality import demo_quality
from smalti.workflows.progress import ProgressReport
from smalti.workflows.run_folder import CONFIG, changes, load_config
from smalti.workflows.train import train
from smalti.workflows.train_setup import new_state, prepare_run

TRAINING_SHARE = 0.8  # of the budget; the rest is validation, previews, the final samples and the page
TIMED_STEPS = 4
VALIDATIONS, SNAPSHOTS = 8, 4
SHORT_MINUTES = 6.0
PLAN = "plan.json"
MEASURED = ("steps", "precision", "validate_every", "sample_every", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the first start measured and chose; a later start continues with it.

    Args:
        networks: kinds of backbones, in the order of the page.
        steps: of every network: the same number, because their multiply-adds are the same.
        seconds: of one training step of each network.
        megabytes: that a training step of each network needs beyond what was held before; empty = cannot be measured.
    """

    networks: tuple[str, ...]
    minutes: float
    steps: int
    precision: Literal["fp32", "bf16"]
    seconds: tuple[float, ...]
    megabytes: tuple[float, ...]


def recipe(network: str, out: Path, seed: int) -> RunConfig:
    """The demo's settings but for the number of steps and the precision; see docs/demo.md for how they were found."""
    return RunConfig(
        out=out / network,
        model=f"{network}-emoji32",
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


def demo(out: Path, *, minutes: float, seed: int, networks: Sequence[str]) -> Path:
    """Run or continue the demo; returns the path of the page.

    Args:
        minutes: budget on this machine; the number of steps is chosen from a measurement at the first start.
        networks: kinds of backbones, each with a preset `<kind>-emoji32`.

    Raises:
        SmaltiError: what the user can mend; PreemptedError when stopped, after saving.
    """
    started = time.monotonic()
    if not networks or len(set(networks)) < len(networks) or not set(networks) <= set(BACKBONES):
        raise ConfigError(f"networks {', '.join(networks) or '(none)'}: choose from {', '.join(BACKBONES)}, each once")
    plan = _stored_plan(out, networks) or _make_plan(out, minutes, seed, networks)
    results = []
    for network in networks:
        config = _config(plan, network, out, seed)
        _refuse_another_run(config)
        with ProgressReport(network, 1) as progress:
            progress.note(f"{config.model}: {config.steps} steps of {config.batch_size} images in {config.precision}")
        results.append((config, train(config)))
    quality = demo_quality({NAMES[config_of(result.model).kind]: config for config, result in results}, out)
    page = build_page(results, dict(zip(networks, plan.megabytes, strict=False)), quality, started)
    write_text(out / "result.json", json.dumps(page.numbers, indent=1) + "\n")
    path = out / "index.html"
    write_text(path, render(page.page))
    return path


def _config(plan: Plan, network: str, out: Path, seed: int) -> RunConfig:
    # Looking takes as long in a short run as in a long one, so a short one looks less often.
    validations, snapshots = (VALIDATIONS, SNAPSHOTS) if plan.minutes >= SHORT_MINUTES else (2, 1)
    return replace(
        recipe(network, out, seed),
        steps=plan.steps,
        precision=plan.precision,
        validate_every=-(-plan.steps // validations),
        sample_every=-(-plan.steps // snapshots),
        checkpoint_every=max(20, -(-plan.steps // 8)),
    )


def _stored_plan(out: Path, networks: Sequence[str]) -> Plan | None:
    path = out / PLAN
    if not path.exists():
        return None
    try:
        plan = from_dict(Plan, json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({' '.join(str(error).split())[:120]}); choose another --out"
        ) from error
    if plan.networks != tuple(networks):
        raise ConfigError(f"{out} holds a demo of {', '.join(plan.networks)}; name these networks or another --out")
    return plan


def _refuse_another_run(config: RunConfig) -> None:
    path = config.out / CONFIG
    if not path.exists():
        return
    stored = replace(load_config(path), out=config.out)
    other = {name: text for name, text in changes(stored, config).items() if name not in MEASURED}
    if other:
        listed = "; ".join(f"{name}: {text}" for name, text in other.items())
        raise ConfigError(f"{config.out} holds another run ({listed}); choose another --out")


def _make_plan(out: Path, minutes: float, seed: int, networks: Sequence[str]) -> Plan:
    """Choose one precision and one number of steps for all by timing a few steps of throw-away states in both."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    cost = {
        precision: [measure_steps(replace(recipe(n, out, seed), precision=precision)) for n in networks]
        for precision in precisions
    }
    totals = {precision: sum(seconds for seconds, _ in rows) for precision, rows in cost.items()}
    best = min(precisions, key=totals.__getitem__)
    steps = max(60, int(minutes * 60 * TRAINING_SHARE / totals[best]))
    seconds, megabytes = zip(*cost[best], strict=True)
    with ProgressReport("measuring", 1) as progress:
        each = ", ".join(f"{n} {s:.2f}" for n, s in zip(networks, seconds, strict=True))
        progress.note(
            f"a step of each takes {totals['fp32']:.2f} s in fp32, {totals['bf16']:.2f} s in bf16 ({each}): "
            f"{steps} steps each in {best} for a budget of {minutes:g} minutes"
        )
    plan = Plan(
        networks=tuple(networks),
        minutes=minutes,
        steps=steps,
        precision=best,
        seconds=seconds,
        megabytes=() if None in megabytes else megabytes,
    )
    write_text(out / PLAN, json.dumps(asdict(plan), indent=1) + "\n")
    return plan


def measure_steps(config: RunConfig) -> tuple[float, float | None]:
    """Median seconds of a training step, and the megabytes that one needs beyond what is held before it."""
    run, model = prepare_run(config)
    steps = train_steps(new_state(run, model), run.batches, replace(config, steps=TIMED_STEPS + 2))
    marks = [time.perf_counter()]
    for _ in itertools.islice(steps, TIMED_STEPS):
        marks.append(time.perf_counter())
    pauses = sorted(b - a for a, b in itertools.pairwise(marks[1:]))  # the first step warms up
    memory = None if peak_memory_refusal(run.device) else peak_memory(lambda: next(steps), run.device).added / 1e6
    return pauses[len(pauses) // 2], memory
