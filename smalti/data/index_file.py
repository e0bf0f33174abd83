"""What one checked pass over images found, stored so that it need not be done again: columns in one sealed file.

A file is a line that names the format, a line with the SHA-256 of all that follows, a line of JSON, and the columns as
bytes. Whatever is damaged, of another version or of other data counts as not there: the pass is done again.
"""

import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smalti.data.made_names import MadeNames
from smalti.errors import StorageError
from smalti.storage.filesystem import LocalFileSystem, make_folders
from smalti.storage.replacing import replace_file

_MAGIC = b"smalti index 1\n"
_AT_ONCE = 1 << 16  # numbers as Python objects


def cache_folder() -> Path:
    """Where built sets and indices are kept: `$XDG_CACHE_HOME/smalti`, else `~/.cache/smalti`. May not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smalti"


class PackedNames(MadeNames):
    """Names in one piece of memory: millions of Python strings would take gigabytes, and minutes of the collector."""

    def __init__(self, text: bytes | memoryview, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "PackedNames":
        """Of names as `os.fsdecode` spells them."""
        text, ends = bytearray(), array("q")
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        return cls(bytes(text), np.array(ends, np.int64))

    @classmethod
    def joined(cls, parts: Sequence["PackedNames"]) -> "PackedNames":
        """One after the other."""
        starts = np.cumsum([0, *(len(part.text) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(b"".join(part.text for part in parts), np.concatenate([np.zeros(0, np.int64), *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return str(self.text[start : int(self.ends[index])], "utf-8", "surrogateescape")

    def spelled(self) -> Iterator[bytes | memoryview]:
        start = 0
        for first in range(0, len(self.ends), _AT_ONCE):
            for end in self.ends[first : first + _AT_ONCE].tolist():
                yield self.text[start:end]
                start = end

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedNames, (bytes(self.text), self.ends)


@dataclass(frozen=True, eq=False)
class StoredIndex:
    """A table: facts about all of it, and columns."""

    facts: Mapping[str, Any]
    columns: Mapping[str, np.ndarray]
    names: Mapping[str, PackedNames]


def index_bytes(index: StoredIndex) -> bytes:
    """The content of an index file."""
    arrays = dict(index.columns)
    for name, packed in index.names.items():
        arrays[f"{name} text"] = np.frombuffer(packed.text, np.uint8)
        arrays[f"{name} ends"] = packed.ends
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    head = {
        "facts": index.facts,
        "columns": {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()},
        "names": list(index.names),
    }
    body = b"".join([json.dumps(head).encode("ascii"), b"\n", *(array.tobytes() for array in arrays.values())])
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def parse_index(data: bytes) -> StoredIndex | None:
    """What `index_bytes` was given; None if a bit of it is another."""
    head_end = len(_MAGIC) + 65
    if not data.startswith(_MAGIC) or len(data) <= head_end:
        return None
    body = memoryview(data)[head_end:]
    if hashlib.sha256(body).hexdigest().encode() + b"\n" != data[len(_MAGIC) : head_end]:
        return None
    # Whole, but a digest is no signature: it may be a stranger's, copied together with his data.
    try:
        return _parse(data, head_end)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        return None


def _parse(data: bytes, head_end: int) -> StoredIndex:
    line, at = data.index(b"\n", head_end), 0
    head = json.loads(data[head_end:line])
    rest, arrays = memoryview(data)[line + 1 :], {}
    for name, (kind, shape) in head["columns"].items():
        if np.dtype(kind).kind not in "iu" or any(n < 0 for n in shape):
            raise ValueError(f"a column of {kind}, {shape}")
        arrays[name] = np.frombuffer(rest, np.dtype(kind), math.prod(shape), at).reshape(shape)
        at += arrays[name].nbytes
    names = {}
    for name in head["names"]:
        text, ends = arrays.pop(f"{name} text").data.cast("B"), arrays.pop(f"{name} ends")
        if ends.ndim != 1 or np.any(np.diff(ends, prepend=0) < 0) or int(ends[-1] if len(ends) else 0) != len(text):
            raise ValueError("names that end where there are none")
        names[name] = PackedNames(text, ends)
    if not isinstance(head["facts"], dict):
        raise ValueError("facts of no kind")
    return StoredIndex(head["facts"], arrays, names)


def read_index(path: Path) -> StoredIndex | None:
    """A stored index; None if there is none that is whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return parse_index(data)


def write_index(path: Path, index: StoredIndex) -> None:
    """Store an index in the place of an older one.

    Raises:
        StorageError: the disk refuses.
    """
    fs = LocalFileSystem()
    try:
        make_folders(fs, path.parent)
        replace_file(fs, path, [index_bytes(index)])
    except OSError as error:
        raise StorageError(f"{path}: the index cannot be stored ({error.strerror})") from error
