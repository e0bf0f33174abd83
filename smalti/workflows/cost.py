"""`cost`: what networks cost at each size of the latents, counted and measured, and where a mixer beats attention."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from smalti.config import did_you_mean
from smalti.cost import (
    Gemm,
    clock_name,
    count_activations,
    count_macs,
    count_parameters,
    measure_interleaved,
    on_meta,
)
from smalti.errors import ConfigError
from smalti.models import BackboneConfig
from smalti.nn.layers import Grid
from smalti.nn.mixers import MIXERS, build_mixer
from smalti.presets import PRESETS, find_preset, list_models, parse_overrides, preset_config
from smalti.presets.swap import swap_mixer
from smalti.training.device import resolve_device
from smalti.workflows.cost_crossovers import find_crossovers, tokens_of
from smalti.workflows.cost_report import CostReport, CostRow, Measuring
from smalti.workflows.timed import TRAINING_FORWARDS, Work, WorkTime, matrix_dtype, time_work

BYTES_PER_WEIGHT = {"forward": 4, "training": 20}  # weights; and gradients, two moments, average
SLOW_GUESS = 4.0  # floors that a first call is feared to take, before anything was measured


def cost(
    names: Sequence[str],
    *,
    override: tuple[str, ...] = (),
    sizes: str = "own",
    mixers: str = "own",
    measuring: Measuring | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> CostReport:
    """Count, and time where asked, each named network at each size and with each mixer.

    Args:
        names: presets, or patterns of them.
        override: settings of all of them, as `("depth=6",)`.
        sizes: sides of square latents, as "32,64,128"; "own" = what each preset is made for.
        mixers: "own", "all", or kinds as "attention,bi_wkv", put into each network in its own mixer's place.
        progress: told what is done next.

    Raises:
        ConfigError: a name, setting, size or mixer that does not exist, or a combination that a backbone refuses.
    """
    variants = [
        (name, kind, [swap_mixer(config, kind) for config in configs])
        for name, configs in _configs(names, override, sizes)
        for kind in _kinds(mixers, configs[0])
    ]
    with _threads(measuring.threads if measuring else None):
        device = resolve_device(measuring.device) if measuring else torch.device("cpu")
        rows = []
        for name, kind, configs in variants:
            before: dict[str, CostRow] = {}  # the last size that was measured, by work
            for config in configs:
                progress(f"{name}, {kind}, {'x'.join(map(str, config.sample_size))}")
                rows.append(_row(name, kind, config, measuring, device, before))
        clock = clock_name(device) if measuring else None
    return CostReport(tuple(rows), tuple(find_crossovers(variants, rows)), measuring, clock)


def _configs(names: Sequence[str], override: tuple[str, ...], sizes: str) -> Iterator[tuple[str, list[BackboneConfig]]]:
    settings = parse_overrides(override)
    sides = _sides(sizes)
    if sides and "sample_size" in settings:
        raise ConfigError("give the size of the latents once: --sizes, or --override sample_size=...")
    for name in _expand(names):
        yield (
            name,
            [preset_config(name, **settings, sample_size=side) for side in sides] or [preset_config(name, **settings)],
        )


def _expand(names: Sequence[str]) -> list[str]:
    if not names:
        raise ConfigError(f"name at least one preset, e.g. {next(iter(PRESETS))}; `smalti presets` lists them")
    found: dict[str, None] = {}
    for name in names:
        if any(sign in name for sign in "*?["):
            matching = list_models(name)
            if not matching:
                raise ConfigError(f"no preset matches {name!r}{did_you_mean(name, PRESETS)}")
            found |= dict.fromkeys(matching)
        else:
            found[find_preset(name).name] = None
    return list(found)


def _sides(sizes: str) -> list[int]:
    if sizes == "own":
        return []
    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"sizes {sizes!r}: expected sides of latents with commas between them, e.g. 32,64,128")
    return sorted({int(part) for part in parts})


def _kinds(mixers: str, config: BackboneConfig) -> list[str]:
    own = config.mixer.kind  # type: ignore[attr-defined]
    if mixers == "own":
        return [own]
    kinds = list(MIXERS) if mixers == "all" else [kind.strip() for kind in mixers.split(",")]
    for kind in kinds:
        if kind not in MIXERS:
            raise ConfigError(f"no mixer {kind!r}{did_you_mean(kind, [*MIXERS, 'own', 'all'])}")
    return list(dict.fromkeys(kinds))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row(
    name: str,
    kind: str,
    config: BackboneConfig,
    measuring: Measuring | None,
    device: torch.device,
    before: dict[str, CostRow],
) -> CostRow:
    row = _count(name, kind, config)
    if measuring is None:
        return row
    gemm_rate = _rate(measuring, device)
    measured: dict[str, WorkTime] = {}
    left_out = []
    work: Work
    for work in ("forward", "training"):
        if work == "training" and measuring.precision == "bf16-weights":
            left_out.append("training step: it keeps float32 weights")
            continue
        if reason := _too_much(row, work, measuring, gemm_rate, before.get(work)):
            left_out.append(f"{work}: {reason}")
            continue
        options: Any = {"batch": measuring.batch, "precision": measuring.precision, "device": device}
        measured[work] = time_work(config, work, repeats=measuring.repeats, **options)
        before[work] = dataclasses.replace(row, measured=measured)
    seconds = _mixer_seconds(config, measuring, device) if "forward" in measured else None
    return dataclasses.replace(row, measured=measured, mixer_seconds=seconds, left_out=tuple(left_out))


def _count(name: str, kind: str, config: BackboneConfig) -> CostRow:
    try:
        network = on_meta(config)
        return CostRow(
            network=name,
            mixer=kind,
            sample_size=config.sample_size,
            tokens=tokens_of(config),
            parameters=count_parameters(network),
            macs=count_macs(network, fused=True),
            activations=count_activations(network),
            measured={},
            mixer_seconds=None,
            left_out=(),
        )
    except ValueError as error:  # a network may refuse a size that its config does not know to be wrong
        raise ConfigError(f"{name} with mixer {kind}: {error}") from error


def _rate(measuring: Measuring, device: torch.device) -> float:
    """Multiply-adds per second, roughly, to foretell how long something will take."""
    gemm = Gemm(matrix_dtype(measuring.precision), device)
    return gemm.macs / measure_interleaved({"": gemm}, device=device, repeats=1)[""].median


def _too_much(row: CostRow, work: Work, measuring: Measuring, rate: float, before: CostRow | None) -> str:
    """ "" when one call is foretold to stay inside the limits, else what it would need."""
    macs = row.macs.of_batch(measuring.batch) * (TRAINING_FORWARDS if work == "training" else 1)
    floors = before.measured[work].floors if before else SLOW_GUESS
    seconds = macs / rate * floors
    if seconds > measuring.max_seconds:
        return f"about {seconds:,.0f} s a call, more than --max-seconds {measuring.max_seconds:g}"
    activations = getattr(row.activations, work) * measuring.batch
    gib = (row.parameters.total * BYTES_PER_WEIGHT[work] + activations) / 2**30
    if gib > measuring.max_gib:
        return f"about {gib:,.1f} GiB, more than --max-gib {measuring.max_gib:g}"
    return ""


def _mixer_seconds(config: BackboneConfig, measuring: Measuring, device: torch.device) -> float:
    """One mixer of the network, alone, on as many tokens as it would see."""
    hidden_size: int = config.hidden_size  # type: ignore[attr-defined]
    grid: Grid = getattr(config, "grid", None) or Grid(*config.sample_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = build_mixer(config.mixer, hidden_size).to(device)  # type: ignore[attr-defined]
        x = torch.randn(measuring.batch, grid.tokens, hidden_size).to(device)
    if measuring.precision == "bf16-weights":
        mixer, x = mixer.to(torch.bfloat16), x.to(torch.bfloat16)

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=measuring.precision == "bf16"):
            return mixer(x, grid)

    return measure_interleaved({"": run}, device=device, repeats=measuring.repeats, min_seconds=0.01)[""].median
