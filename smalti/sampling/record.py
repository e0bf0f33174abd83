"""`sample.json`: what a folder of samples is, and whether it is whole; sealed, so that a changed one is noticed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smalti.config import from_dict, to_dict
from smalti.errors import CheckpointError, ConfigError
from smalti.sampling.config import SamplingConfig
from smalti.storage.sealed import check_format, seal, smalti_version, unseal

FORMAT, VERSION = "smalti-samples", 1
RECORD = "sample.json"


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """Where the class of each image comes from.

    Attributes:
        rule: none = the model has no classes; given = `classes` in turn; random = uniform and independent, from each
            image's seed, as in the papers; balanced = every class in turn, so that counts differ by one at most.
        sha256: of the labels, so that two sets can be compared without them.
    """

    rule: Literal["none", "given", "random", "balanced"]
    num_classes: int
    classes: tuple[int, ...] = ()
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleIdentity:
    """Everything that decides the bytes of a sample set. Two processes with the same one work on the same set."""

    weights_sha256: str
    config_sha256: str  # of network settings and objective
    seeds: str
    count: int
    label_rule: LabelRule
    sampling: SamplingConfig
    image_size: tuple[int, int]
    micro_batch: int
    chunk_size: int
    precision: str
    inference: str
    device: str  # its type
    threads: int
    torch: str
    save: tuple[str, ...]
    decoder: str = "pixels"  # the label of the codec that latents were decoded by

    @property
    def digest(self) -> str:
        """One number for all of it."""
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()

    @property
    def chunks(self) -> int:
        """How many chunks the set is made in."""
        return -(-self.count // self.chunk_size)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of the model, for people and for protocols; nothing here decides a bit.

    Attributes:
        weights: "ema" = moving averages, as `smalti train` stores them; for converted weights which part of the file
            was taken; "unknown" where the folder does not say.
        schedule: of the noise it was trained on.
        learned_variance: it says itself how noisy ancestral steps are.
        steps: of its training, where known.
    """

    path: str
    kind: str
    weights: str
    schedule: str
    learned_variance: bool
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """A file of the finished set, or all its PNGs together (name `SEED.png`; the digest is of all their digests)."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """A set of samples: its identity, what is known beside it, and, once it is whole, its files.

    Attributes:
        images_sha256: of all pixels, uint8 (N, H, W, 3) in the order of the seeds, whatever they are stored in.
    """

    identity: SampleIdentity
    model: ModelFacts
    device_name: str
    smalti: str
    outputs: tuple[OutputFile, ...] = ()
    images_sha256: str = ""

    @property
    def complete(self) -> bool:
        return bool(self.outputs)


def record_bytes(record: SampleRecord) -> bytes:
    """What `read_record` reads."""
    head = {"format": FORMAT, "version": VERSION, "smalti": smalti_version()}
    return seal(head | {"record": to_dict(record)})


def read_record(folder: Path) -> SampleRecord:
    """The record of a folder of samples.

    Raises:
        CheckpointError: there is none, or it is damaged or of a newer format.
    """
    path = Path(folder) / RECORD
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {RECORD}: expected a folder that `smalti sample` wrote") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    document = unseal(data, str(path))
    check_format(document, FORMAT, VERSION, str(path))
    try:
        return from_dict(SampleRecord, document.get("record"), str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; it was written by another smalti than this one") from error


def first_difference(stored: Any, wanted: Any) -> str:
    """The first setting in which two sets differ, as "name: stored there, wanted now"; "" if none does."""
    there, now = _flat(to_dict(stored)), _flat(to_dict(wanted))
    for name in now:
        if there.get(name) != now[name]:
            return f"{name}: {_short(there.get(name))} there, {_short(now[name])} now"
    return ""


def labels_sha256(class_labels: Sequence[int] | None) -> str:
    """A digest of one label per image."""
    return "" if class_labels is None else hashlib.sha256(",".join(map(str, class_labels)).encode()).hexdigest()


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in their order, as short as `--seeds` allows: 0-49, or 3,7,20-29."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
