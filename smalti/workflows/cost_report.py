"""What `cost` finds: rows, crossovers, and the same for machines."""

import dataclasses
import json
from dataclasses import dataclass

from smalti.cost import ActivationBytes, MacCount, ParameterCount
from smalti.errors import ConfigError
from smalti.workflows.timed import Precision, WorkTime


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


def seconds_of(row: CostRow, what: str) -> float | None:
    """Measured forward of the mixer or the network, None where it was left out."""
    if what == "mixer":
        return row.mixer_seconds
    return row.measured["forward"].seconds if "forward" in row.measured else None


def macs_of(row: CostRow, what: str) -> int:
    """Counted forward of the mixers or the network."""
    return row.macs.by_part.get("mixer", 0) if what == "mixer" else row.macs.total


def as_json(report: CostReport) -> str:
    """One JSON object: `rows`, `crossovers`, `measuring`, `clock`."""
    return json.dumps(dataclasses.asdict(report))
