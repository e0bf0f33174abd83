"""`index.safetensors` of a latent set, read piece by piece into as little memory as its numbers need.

Of 14 million latents the file has more than a gigabyte. So it is hashed and taken apart on its way, and never held as a
whole; what comes out counts only if all of it had the hash that the record says.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from smalti.data.index_file import PackedNames
from smalti.data.latent_record import INDEX, RECORD, LatentRecord
from smalti.errors import DataError
from smalti.storage.objects import ByteStore

_PIECE = 1 << 24  # bytes of one request, a multiple of the 8 of a number
_MOST_HEAD = 1 << 20
_WIDTHS = {"I64": 8, "U8": 1}
_NAMES = ("item_names", "split_names")
_WANTED = ("class_labels", "crc32", *(f"{column}.{part}" for column in _NAMES for part in ("bytes", "ends")))


@dataclass(frozen=True, eq=False)
class LatentIndex:
    """What is known of each example.

    Attributes:
        class_labels: int64 (N,), or empty without classes.
        crc32: uint32 (N, views), of the bytes of each posterior.
    """

    class_labels: np.ndarray
    crc32: np.ndarray
    item_names: PackedNames
    split_names: PackedNames


def read_index(store: ByteStore, record: LatentRecord) -> LatentIndex:
    """The index that a record speaks of.

    Raises:
        DataError: it is damaged, or does not fit the record.
        MissingObjectError, StorageError: it cannot be read.
    """
    assert record.index is not None
    size = record.index.bytes
    if store.size(INDEX) != size:
        raise _damaged(store, f"its size or sha256 is not the one in {RECORD}")
    file = _Pieces(store, size)
    malformed, misfit, columns = "", "", dict[str, _Column]()
    try:
        layout = _layout(file)
    except ValueError as error:
        malformed, layout = str(error), {}
    if not malformed:
        misfit = _misfit_of_shapes(layout, record)
    if not malformed and not misfit:
        columns = _read_columns(file, layout)
    file.skip(size - file.at)
    if file.digest.hexdigest() != record.index.sha256:
        raise _damaged(store, f"its size or sha256 is not the one in {RECORD}")
    if malformed:
        raise _damaged(store, malformed)
    if misfit := misfit or _misfit_of_values(columns, record):
        raise DataError(f"{store.place}/{INDEX} does not fit {RECORD}: {misfit}; encode them again")
    items = _names(columns, "item_names")
    splits = _names(columns, "split_names") if "split_names.ends" in columns else items
    return LatentIndex(columns["class_labels"].values, columns["crc32"].values, items, splits)


@dataclass(frozen=True)
class _Place:
    """A tensor in the file."""

    kind: str
    shape: tuple[int, ...]
    bytes: int


class _Pieces:
    """A file from front to back, hashed on its way, fetched in large pieces."""

    def __init__(self, store: ByteStore, size: int) -> None:
        self.at, self.digest = 0, hashlib.sha256()
        self._store, self.size, self._held = store, size, memoryview(b"")

    def take(self, count: int) -> memoryview:
        """The next bytes; at most to the end of the file."""
        if count > len(self._held):
            stop = min(self.at + max(count, _PIECE), self.size)
            self._held = memoryview(self._store.read(INDEX, self.at, stop) if stop > self.at else b"")
        taken, self._held = self._held[:count], self._held[count:]
        self.digest.update(taken)
        self.at += len(taken)
        return taken

    def skip(self, count: int) -> None:
        """Only hash the next bytes."""
        for _ in self.parts(count):
            pass

    def parts(self, count: int) -> Iterator[memoryview]:
        """The next bytes, some at a time."""
        for start in range(0, count, _PIECE):
            yield self.take(min(_PIECE, count - start))


def _layout(file: _Pieces) -> dict[str, _Place]:
    """The tensors in the order in which they follow each other to the end of the file.

    Raises:
        ValueError: this is no safetensors file.
    """
    length = int.from_bytes(file.take(8), "little")
    if length > min(_MOST_HEAD, file.size - 8):
        raise ValueError("it has no header of a safetensors file")
    places: list[tuple[int, str, _Place]] = []
    try:
        head = json.loads(bytes(file.take(length)))
        for name, entry in head.items():
            if name != "__metadata__":
                kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                if not isinstance(kind, str) or any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
                    raise ValueError(f"{name} lies nowhere")
                if kind in _WIDTHS and stop - start != math.prod(shape) * _WIDTHS[kind]:
                    raise ValueError(f"{name} has {stop - start} bytes")
                places.append((start, name, _Place(kind, shape, stop - start)))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("its header is not of a safetensors file") from error
    end = 0
    places.sort(key=lambda row: (row[0], row[2].bytes))
    for start, name, place in places:
        if start != end or place.bytes < 0:
            raise ValueError(f"{name} does not follow what lies before it")
        end = start + place.bytes
    if end != file.size - file.at:
        raise ValueError("it is longer or shorter than its header says")
    return {name: place for _, name, place in places}


def _misfit_of_shapes(layout: dict[str, _Place], record: LatentRecord) -> str:
    """Why these are not the tensors of the index of these latents, or ""."""
    count = record.identity.count
    wanted = {"class_labels": (count if record.class_names else 0,), "crc32": (count, record.identity.views)}
    wanted |= {f"{column}.ends": (count,) for column in _columns(layout)}
    for name, shape in wanted.items():
        if name not in layout or (layout[name].kind, layout[name].shape) != ("I64", shape):
            return f"{name} is no table of {shape} whole numbers"
    for column in _columns(layout):
        text = layout.get(f"{column}.bytes")
        if text is None or text.kind != "U8" or len(text.shape) != 1:
            return f"{column} have no letters"
    return ""


def _columns(layout: Mapping[str, object]) -> list[str]:
    return ["item_names", *(["split_names"] if "split_names.ends" in layout else [])]


@dataclass(frozen=True, eq=False)
class _Column:
    """A tensor as an array, and what it said before it was made narrower."""

    values: np.ndarray
    low: int
    high: int
    rises: bool

    @classmethod
    def read(cls, file: _Pieces, place: _Place, kind: type[np.generic]) -> "_Column":
        """
        Args:
            kind: of the array; what does not fit into it is cut off, and shows in `low` and `high`.
        """
        values = np.empty(math.prod(place.shape), kind)
        lows, highs, last, rises, at = list[int](), list[int](), 0, True, 0
        for part in file.parts(place.bytes):
            numbers = np.frombuffer(part, "<i8" if place.kind == "I64" else np.uint8)
            values[at : at + len(numbers)] = numbers
            if place.kind == "I64":
                lows.append(int(numbers.min()))
                highs.append(int(numbers.max()))
                rises = rises and last <= int(numbers[0]) and not bool((numbers[1:] < numbers[:-1]).any())
                last = int(numbers[-1])
            at += len(numbers)
        return cls(values.reshape(place.shape), min(lows, default=0), max(highs, default=0), rises)


def _read_columns(file: _Pieces, layout: dict[str, _Place]) -> dict[str, _Column]:
    columns = {}
    for name, place in layout.items():
        kind: type[np.generic] = np.uint32
        if name == "class_labels" or (name.endswith(".ends") and layout[f"{name[:-5]}.bytes"].bytes >= 1 << 32):
            kind = np.int64
        if name.endswith(".bytes"):
            kind = np.uint8
        if name in _WANTED:
            columns[name] = _Column.read(file, place, kind)
        else:
            file.skip(place.bytes)
    return columns


def _misfit_of_values(columns: dict[str, _Column], record: LatentRecord) -> str:
    """Why this is not the content of the index of these latents, or ""."""
    labels, checksums, classes = columns["class_labels"], columns["crc32"], len(record.class_names)
    if labels.low < 0 or labels.high >= max(1, classes):
        return f"labels from {labels.low} to {labels.high} of {classes} classes"
    if checksums.low < 0 or checksums.high >= 1 << 32:
        return "checksums of more than 32 bits"
    for column in _columns(columns):
        text, ends = columns[f"{column}.bytes"].values, columns[f"{column}.ends"]
        if not ends.rises or ends.high != len(text):  # what rises ends with its highest
            return f"{column} end where there are none"
    return ""


def _names(columns: dict[str, _Column], column: str) -> PackedNames:
    return PackedNames(columns[f"{column}.bytes"].values.data, columns[f"{column}.ends"].values)


def _damaged(store: ByteStore, reason: str) -> DataError:
    return DataError(f"{store.place}/{INDEX} is damaged: {reason}")
