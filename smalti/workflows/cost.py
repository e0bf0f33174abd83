"""`cost`: what networks cost at each size of the latents, counted and measured, and where a mixer beats attention."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.config import did_you_mean
from smalti.cost import (
    ActivationBytes,
    Gemm,
    MacCount,
    ParameterCount,
    clock_name,
    count_activations,
    count_macs,
    count_parameters,
    measure_interleaved,
)
from smalti.errors import ConfigError
from smalti.models import BackboneConfig
from smalti.nn.layers import Grid
from smalti.nn.mixers import MIXERS, build_mixer
from smalti.presets import PRESETS, find_preset, list_models, parse_overrides, preset_config
from smalti.presets.swap import swap_mixer
from smalti.training.device import resolve_device
from smalti.workflows.timed import TRAINING_FORWARDS, Precision, Work, WorkTime, matrix_dtype, time_work

BASELINE = "attention"
SIDE_STEP = 8  # crossovers are looked for among latents of these sides, which every network can cut into tokens
BYTES_PER_WEIGHT = {"forward": 4, "training": 20}  # weights; and gradients, two moments, average
SLOW_GUESS = 4.0  # floors that a first call is feared to take, before anything was measured


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How networks are timed, and what is left out.

    Args:
        batch: images at once.
        threads: of the CPU; with one, CPU time is read, which other processes do not disturb.
        max_seconds: longest single call, as foretold from the counts and the sizes before it.
        max_gib: most memory of a single call, foretold likewise.
    """

    batch: int = 1
    precision: Precision = "fp32"
    device: str = "cpu"
    threads: int = 1
    repeats: int = 5
    max_seconds: float = 10.0
    max_gib: float = 4.0

    def __post_init__(self) -> None:
        if min(self.batch, self.threads, self.repeats) < 1:
            raise ConfigError(
                f"batch {self.batch}, threads {self.threads} and repeats {self.repeats} must be at least 1"
            )
        if not (self.max_seconds > 0 and self.max_gib > 0):
            raise ConfigError(f"max_seconds {self.max_seconds} and max_gib {self.max_gib} must be above 0")


@dataclass(frozen=True)
class CostRow:
    """One network at one size.

    Args:
        network: the preset's name.
        mixer: the kind of its mixer.
        tokens: of the mixer at the highest resolution.
        macs: of the inference form.
        measured: by "forward" and "training".
        mixer_seconds: of one mixer alone, forward, with its projections.
        left_out: what was not measured, and why.
    """

    network: str
    mixer: str
    sample_size: tuple[int, int]
    tokens: int
    parameters: ParameterCount
    macs: MacCount
    activations: ActivationBytes
    measured: dict[str, WorkTime]
    mixer_seconds: float | None
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Crossover:
    """From where on a network with another mixer is cheaper than the same network with attention.

    Args:
        what: "mixer" (one of them, with its projections) or "network".
        unit: "multiply-adds" or "seconds".
        tokens: the first number of tokens at which it is cheaper; None = at none up to `largest`.
        exact: counted at this size, not read between two measured ones.
        smallest, largest: the range that was looked at.
    """

    network: str
    mixer: str
    what: str
    unit: str
    tokens: int | None
    exact: bool
    smallest: int
    largest: int


@dataclass(frozen=True)
class CostReport:
    """All rows and crossovers; `measuring` is None where nothing was timed."""

    rows: tuple[CostRow, ...]
    crossovers: tuple[Crossover, ...]
    measuring: Measuring | None
    clock: str | None


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
    return CostReport(tuple(rows), tuple(_crossovers(variants, rows)), measuring, clock)


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
        return CostRow(
            network=name,
            mixer=kind,
            sample_size=config.sample_size,
            tokens=_tokens(config),
            parameters=count_parameters(config),
            macs=count_macs(config, fused=True),
            activations=count_activations(config),
            measured={},
            mixer_seconds=None,
            left_out=(),
        )
    except ValueError as error:  # a network may refuse a size that its config does not know to be wrong
        raise ConfigError(f"{name} with mixer {kind}: {error}") from error


def _tokens(config: BackboneConfig) -> int:
    grid: Grid = getattr(config, "grid", None) or Grid(*config.sample_size)
    return grid.tokens


def _rate(measuring: Measuring, device: torch.device) -> float:
    """Multiply-adds per second, roughly, to foretell how long something will take."""
    gemm = Gemm(matrix_dtype(measuring.precision), device)
    return gemm.macs / measure_interleaved({"": gemm}, device=device, repeats=1)[""].median


def _too_much(row: CostRow, work: Work, measuring: Measuring, rate: float, before: CostRow | None) -> str:
    """ "" when one call is foretold to stay inside the limits, else what it would need."""
    macs = row.macs.total * measuring.batch * (TRAINING_FORWARDS if work == "training" else 1)
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


# --- crossovers


def _crossovers(
    variants: Sequence[tuple[str, str, list[BackboneConfig]]], rows: Sequence[CostRow]
) -> Iterator[Crossover]:
    """Of every mixer beside attention in the same network."""
    attention = {name: configs for name, kind, configs in variants if kind == BASELINE}
    for name, kind, configs in variants:
        if kind == BASELINE or name not in attention:
            continue
        largest = configs[-1]
        for what in ("mixer", "network"):
            yield _counted_crossover(name, kind, what, largest, attention[name][-1])
        ours = [row for row in rows if (row.network, row.mixer) == (name, kind)]
        theirs = [row for row in rows if (row.network, row.mixer) == (name, BASELINE)]
        for what in ("mixer", "network"):
            yield from _measured_crossover(name, kind, what, ours, theirs)


def _counted_crossover(name: str, kind: str, what: str, ours: BackboneConfig, theirs: BackboneConfig) -> Crossover:
    """By bisection over the side of square latents, counted anew at each."""

    def at(side: int) -> BackboneConfig:
        return dataclasses.replace(ours, sample_size=(side, side))

    def cheaper(side: int) -> bool:
        size = (side, side)
        one, other = (
            count_macs(at(side), fused=True),
            count_macs(dataclasses.replace(theirs, sample_size=size), fused=True),
        )
        return one.by_part["mixer"] < other.by_part["mixer"] if what == "mixer" else one.total < other.total

    low, high = 1, max(1, max(ours.sample_size) // SIDE_STEP)  # in steps
    smallest, largest = _tokens(at(low * SIDE_STEP)), _tokens(at(high * SIDE_STEP))
    found: int | None
    if cheaper(low * SIDE_STEP):
        found = low
    elif not cheaper(high * SIDE_STEP):
        found = None
    else:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if cheaper(middle * SIDE_STEP) else (middle, high)
        found = high
    tokens = None if found is None else _tokens(at(found * SIDE_STEP))
    return Crossover(name, kind, what, "multiply-adds", tokens, True, smallest, largest)


def _measured_crossover(
    name: str, kind: str, what: str, ours: Sequence[CostRow], theirs: Sequence[CostRow]
) -> Iterator[Crossover]:
    """Between the last measured size at which attention is faster and the next, on a straight line of logarithms."""
    points = [
        (a.tokens, math.log(mine / other))
        for a, b in zip(ours, theirs, strict=True)
        if (mine := seconds_of(a, what)) is not None and (other := seconds_of(b, what)) is not None
    ]
    if not points:
        return
    smallest, largest = points[0][0], points[-1][0]
    tokens: int | None
    last_slower = max((i for i, (_, ratio) in enumerate(points) if ratio >= 0), default=None)
    if last_slower is None:
        tokens = smallest
    elif last_slower == len(points) - 1:
        tokens = None
    else:
        (left, above), (right, below) = points[last_slower], points[last_slower + 1]
        share = above / (above - below)
        tokens = round(math.exp(math.log(left) + share * math.log(right / left)))
    yield Crossover(name, kind, what, "seconds", tokens, False, smallest, largest)


def seconds_of(row: CostRow, what: str) -> float | None:
    """Measured forward of the mixer or the network, None where it was left out."""
    if what == "mixer":
        return row.mixer_seconds
    return row.measured["forward"].seconds if "forward" in row.measured else None


def macs_of(row: CostRow, what: str) -> int:
    """Counted forward of the mixers or the network."""
    return row.macs.by_part.get("mixer", 0) if what == "mixer" else row.macs.total


# --- for machines


def as_json(report: CostReport) -> str:
    """One JSON object: `rows`, `crossovers`, `measuring`, `clock`."""
    return json.dumps(dataclasses.asdict(report))
