"""Results: numbers with their protocol, in files that notice any change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smalti.config import did_you_mean, from_dict, to_dict
from smalti.errors import CheckpointError, ConfigError, DataError, NumericError
from smalti.evaluation.metric import GROUPS, T_95, Estimate, Metric, Values, jackknife
from smalti.evaluation.protocol import Protocol, as_json_has_it
from smalti.storage.filesystem import FileSystem, LocalFileSystem, make_folders, storage_errors
from smalti.storage.replacing import replace_file
from smalti.storage.sealed import check_format, seal, smalti_version, unseal

_FORMAT, _VERSION = "smalti result", 1


@dataclass(frozen=True)
class Source:
    """Where the images came from. Two results may differ in all of this and still be compared.

    Attributes:
        name: in tables: a run's or a folder's name.
        path: what was evaluated.
        model: facts, as preset, step, parameters; empty for images of unknown origin.
    """

    name: str
    path: str
    model: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_json_has_it(self.model, "model facts"))


@dataclass(frozen=True)
class FloorValue:
    """The same number for real images that are not in the reference: what a perfect model would reach.

    Attributes:
        count: of those images. Where there are fewer of them than of ours, the floor may lie too high.
    """

    value: float
    count: int


@dataclass(frozen=True)
class Number:
    """One metric of a result.

    Attributes:
        metric: its key in `METRICS`.
        label: as papers write it, with the feature network's name where it needs one.
    """

    metric: str
    label: str
    better: Literal["lower", "higher"]
    estimate: Estimate
    floor: FloorValue | None = None

    def __post_init__(self) -> None:
        e = self.estimate
        values = (e.value, e.standard_error, e.low, e.high, self.floor.value if self.floor else None, *e.without)
        if not all(value is None or math.isfinite(value) for value in values):
            raise NumericError(
                f"{self.label} is not finite ({', '.join(map(str, values))}); a result holds finite numbers only"
            )


@dataclass(frozen=True, kw_only=True)
class Result:
    """The numbers of one set of images, and how they were made.

    Attributes:
        memorisation: from the report of nearest training images: its facts, and under "sentence" what they say.
        machine: device, threads, versions: facts beside the numbers.
        seconds: that the evaluation took.
        created: UTC, ISO 8601.

    Raises:
        ConfigError: a number twice, or one whose metric has no rule in the protocol.
    """

    source: Source
    protocol: Protocol
    numbers: tuple[Number, ...]
    memorisation: dict | None = None
    machine: dict = field(default_factory=dict)
    seconds: float | None = None
    created: str = ""

    def __post_init__(self) -> None:
        rules = {rule.name for rule in self.protocol.metrics}
        names = [number.metric for number in self.numbers]
        if len(set(names)) < len(names) or not rules.issuperset(names):
            raise ConfigError(
                f"a result has each number once and a rule for it; got numbers {', '.join(names)} and rules "
                f"{', '.join(sorted(rules)) or 'for none'}"
            )
        object.__setattr__(self, "memorisation", as_json_has_it(self.memorisation, "memorisation"))
        object.__setattr__(self, "machine", as_json_has_it(self.machine, "machine facts"))

    def number(self, metric: str) -> Number:
        """The number of one metric.

        Raises:
            ConfigError: this result has none.
        """
        for number in self.numbers:
            if number.metric == metric:
                return number
        have = [number.metric for number in self.numbers]
        raise ConfigError(f"{self.source.name} has no number {metric!r}{did_you_mean(metric, have)}")


def numbers_of(
    estimates: Mapping[str, Estimate],
    table: Mapping[str, Metric],
    *,
    network: str,
    floors: Mapping[str, float] | None = None,
    floor_count: int = 0,
) -> tuple[Number, ...]:
    """What `measure` found, as a result holds it.

    Args:
        network: name of the feature network, for the labels.
        floors: from `clean_floor`: its values. floor_count: its count.
    """
    below = {name: FloorValue(value, floor_count) for name, value in (floors or {}).items()}
    return tuple(
        Number(name, table[name].label_for(network), table[name].better, estimate, below.get(name))
        for name, estimate in estimates.items()
    )


def write_result(result: Result, path: Path, fs: FileSystem | None = None) -> None:
    """One sealed JSON file, whole or not at all; it takes the place of an earlier one.

    Raises:
        StorageError: the disk is full or refuses.
    """
    fs = fs or LocalFileSystem()
    document = {"format": _FORMAT, "version": _VERSION, "smalti": smalti_version(), **to_dict(result)}
    data = seal(document)
    with storage_errors(fs, path.parent, len(data), f"result {path.name}", "make room and run again"):
        make_folders(fs, path.parent)
        replace_file(fs, path, [data])


def read_result(path: Path) -> Result:
    """What `write_result` wrote.

    Raises:
        DataError: there is no such file.
        CheckpointError: it was changed since, or is something else.
        NewerFormatError: a newer smalti wrote it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; give a result file") from error
    document = unseal(data, str(path))
    check_format(document, _FORMAT, _VERSION, str(path))
    for key in ("format", "version", "smalti"):
        document.pop(key, None)
    try:
        return from_dict(Result, document, str(path))
    except (ConfigError, NumericError) as error:
        raise CheckpointError(f"{error}; it is no result as smalti writes them") from error


def difference(a: Estimate, b: Estimate, *, same_groups: bool = False) -> Estimate | None:
    """By how much `b` is above `a`, with its 95 % interval; None where one of them has no error.

    What the common reference adds to both numbers is not in the interval. Where the errors were added, `without` is
    empty.

    Args:
        same_groups: image i of both sets belongs to the same group, which holds where both have equally many images.
            The error is then that of the difference without each group in turn: whatever images of one group share,
            as the noise and the labels of their seeds, cancels, and independent sets lose nothing. Otherwise, or where
            one of the two does not know its values without the groups, both errors are added as independent. Each
            of them has nine degrees of freedom and their sum between nine and eighteen; the interval takes nine, the
            wider one.
    """
    if a.standard_error is None or b.standard_error is None:
        return None
    gap = b.value - a.value
    if same_groups and len(a.without) == len(b.without) == GROUPS:
        without = tuple(theirs - ours for ours, theirs in zip(a.without, b.without, strict=True))
        return jackknife(Values(gap, without))
    error = math.hypot(a.standard_error, b.standard_error)
    reach = T_95 * error
    return Estimate(gap, error, gap - reach, gap + reach)
