"""One pass over one tar shard: every image decoded, every label read, every member accounted for.

Members of one key (the path up to the first dot of the file name) are one example, as webdataset lays them out: an
image `KEY.jpg`, and maybe its label as `KEY.cls` (a number) or `KEY.json` (`label`, `cls`, `class`, `class_label` or
`class_id`: a number or a name). Without those, the first folder of the path is the class.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from smalti.data.decoding import UnusableImageError, decode, looks_like_image
from smalti.data.folder_pass import IMAGE_SUFFIXES, RejectedFile
from smalti.data.index_file import PackedNames, StoredIndex
from smalti.data.shard_names import KeyNames, key_of
from smalti.data.tar_file import Member, walk_members
from smalti.storage.objects import ByteStore

FORMAT, VERSION = "tar shard", 1
_LABEL_KEYS = ("label", "cls", "class", "class_label", "class_id")
_MAX_LABEL = 1 << 20
_MAX_RECORD_BYTES = 1 << 20
NUMBER, NAME, FOLDER = range(3)  # where a label comes from


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What a shard holds, one row for each usable image in the order of the shard.

    Attributes:
        version: of the file that was looked at, as its store tells it.
        paths: of the images' members; `keys` of their examples, which are beginnings of the paths.
        offset, size: where an image's bytes lie in the shard; `crc` is their CRC-32, `digest` half of their SHA-256.
            Not to be added to each other as they are: see `compact`.
        image_size: (N, 2) rows and columns, upright.
        source: where each label comes from: a number, a name, or the folder.
        label: the number, or the place in `label_names`; -1 where there is no folder.
        rejected: what cannot be used, with the reason.
    """

    shard: str
    version: str
    bytes: int
    paths: PackedNames
    keys: PackedNames | KeyNames
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    digest: np.ndarray
    image_size: np.ndarray
    source: np.ndarray
    label: np.ndarray
    label_names: tuple[str, ...]
    kinds: tuple[tuple[str, int], ...]
    notes: tuple[tuple[str, str], ...]
    rejected: tuple[RejectedFile, ...]

    def __len__(self) -> int:
        return len(self.offset)


_COLUMNS = {  # how wide a row is, and its type
    "offset": ((), "<i8"),
    "size": ((), "<i8"),
    "crc": ((), "<u4"),
    "digest": ((2,), "<u8"),
    "image_size": ((2,), "<i4"),
    "source": ((), "<i4"),
    "label": ((), "<i4"),
}


def stored(index: ShardIndex) -> StoredIndex:
    """The index as it goes into a file."""
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "shard": index.shard,
        "of": index.version,
        "bytes": index.bytes,
        "label_names": index.label_names,
        "kinds": index.kinds,
        "notes": index.notes,
        "rejected": [(r.path, r.reason, r.other) for r in index.rejected],
    }
    columns = {name: _widened(getattr(index, name), np.dtype(kind)) for name, (_, kind) in _COLUMNS.items()}
    keys = index.keys if isinstance(index.keys, PackedNames) else PackedNames.of(index.keys)
    paths = PackedNames(index.paths.text, _widened(index.paths.ends, np.dtype(np.int64)))
    return StoredIndex(facts, columns, {"paths": paths, "keys": keys})


def compact(index: ShardIndex) -> ShardIndex:
    """The same index in as little memory as its numbers need: millions of rows stay there as long as a run takes.

    Columns get the narrowest of a few types, those that say the same of each row become a view of one row, and keys
    one of the paths.
    """
    columns: dict[str, Any] = {name: _narrowed(getattr(index, name)) for name in _COLUMNS}
    paths = PackedNames(bytes(index.paths.text), _narrowed(index.paths.ends))
    return replace(index, paths=paths, keys=KeyNames(paths), **columns)


def _narrowed(column: np.ndarray) -> np.ndarray:
    if not column.size:
        return column.copy()
    if (column == column[0]).all():
        return np.broadcast_to(column[0].copy(), column.shape)
    low, high = int(column.min()), int(column.max())
    fits = (kind for kind in (np.uint16, np.uint32) if low >= 0 and high <= np.iinfo(kind).max)
    return column.astype(next(fits, column.dtype))


def _widened(column: np.ndarray, kind: np.dtype) -> np.ndarray:
    """A column as it goes into a file; left as it is where that would lose something."""
    return column.astype(kind) if np.can_cast(column.dtype, kind, "safe") else column


def restored(found: StoredIndex, shard: str) -> ShardIndex | None:
    """What `stored` made; None if it is of another shard or version, or describes what no pass can find."""
    facts = found.facts
    if (facts.get("format"), facts.get("version"), facts.get("shard")) != (FORMAT, VERSION, shard):
        return None
    try:
        index = _restored(found, shard)
        return index if _is_possible(index) else None
    except (KeyError, TypeError, ValueError):
        return None


def _is_possible(index: ShardIndex) -> bool:
    """Whether a pass could have made this. A digest is no signature: an index may be a stranger's, like his shards."""
    count = len(index.paths)
    columns = {name: getattr(index, name) for name in _COLUMNS}
    shaped = all(columns[name].shape == (count, *row) and columns[name].dtype.str == kind
                 for name, (row, kind) in _COLUMNS.items())  # fmt: skip
    texts = (index.version, *index.label_names, *(t for r in index.rejected for t in (r.path, r.reason)))
    texts += tuple(t for row in (*index.notes,) for t in row) + tuple(kind for kind, _ in index.kinds)
    if not shaped or not all(isinstance(text, str) for text in texts):
        return False
    if not isinstance(index.keys, PackedNames) or not KeyNames(index.paths).are(index.keys):
        return False
    if not all(type(number) is int for number in (index.bytes, *(count for _, count in index.kinds))):
        return False
    numbered = index.source == NUMBER
    most = np.where(numbered, _MAX_LABEL, len(index.label_names))
    least = np.where(index.source == FOLDER, -1, 0)
    inside = (index.offset >= 0) & (index.size >= 0) & (index.size <= index.bytes - index.offset)
    labelled = (index.label >= least) & (index.label < most) & (index.source >= NUMBER) & (index.source <= FOLDER)
    return bool((inside & labelled & (index.image_size > 0).all(axis=1)).all())


def _restored(found: StoredIndex, shard: str) -> ShardIndex:
    facts = found.facts
    return ShardIndex(
        shard=shard,
        version=facts["of"],
        bytes=facts["bytes"],
        paths=found.names["paths"],
        keys=found.names["keys"],
        label_names=tuple(facts["label_names"]),
        kinds=tuple((kind, count) for kind, count in facts["kinds"]),
        notes=tuple((path, note) for path, note in facts["notes"]),
        rejected=tuple(RejectedFile(*row) for row in facts["rejected"]),
        **{name: found.columns[name] for name in _COLUMNS},
    )


@dataclass(frozen=True)
class _Row:
    """A decoded image, without its pixels."""

    path: str
    offset: int
    size: int
    crc: int
    digest: bytes
    image_size: tuple[int, int]
    kind: str


@dataclass
class _Example:
    """The members of one key. `broken` is an image that cannot be decoded, and is rejected already."""

    images: list[_Row] = field(default_factory=list)
    labels: list[tuple[str, bytes]] = field(default_factory=list)
    broken: bool = False


def index_shard(store: ByteStore, shard: str) -> ShardIndex:
    """Read a shard once, from front to back.

    Raises:
        DamagedTarError: it is cut off or damaged.
        DataError, StorageError: it cannot be read.
    """
    version, size = store.version(shard), store.size(shard)
    examples: dict[str, _Example] = {}
    rejected: list[RejectedFile] = []
    notes: list[tuple[str, str]] = []
    seen: set[str] = set()
    for member in walk_members(store, shard):
        if member.refused:
            rejected.append(RejectedFile(member.path, member.refused))
        elif member.path in seen:
            rejected.append(RejectedFile(member.path, "stands twice in the shard"))
        elif not any(part.startswith(".") for part in member.path.split("/")):
            seen.add(member.path)
            _sort_in(member, examples, rejected, notes)
    table = _Table()
    for key, example in examples.items():
        try:
            table.add(key, example, rejected)
        except UnusableImageError as error:
            first = example.images[0].path if example.images else example.labels[0][0]
            rejected.append(RejectedFile(first, str(error)))
    rejected.sort(key=lambda r: r.path)
    return table.index(shard, version, size, tuple(notes), tuple(rejected))


def _sort_in(
    member: Member, examples: dict[str, _Example], rejected: list[RejectedFile], notes: list[tuple[str, str]]
) -> None:
    key, rest = key_of(member.path)
    data = member.data or b""
    if rest.lower() in ("cls", "json"):
        examples.setdefault(key, _Example()).labels.append((member.path, data))
    elif os.path.splitext(member.path)[1].lower() in IMAGE_SUFFIXES or looks_like_image(data[:16]):
        example = examples.setdefault(key, _Example())
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                decoded = decode(data)
        except UnusableImageError as error:
            example.broken = True
            rejected.append(RejectedFile(member.path, str(error)))
            return
        found = (*decoded.notes, *(" ".join(str(w.message).split()) for w in caught))
        notes.extend((member.path, note) for note in found)
        image_size, kind = (decoded.image.height, decoded.image.width), f"{decoded.format} {decoded.mode}"
        digest = hashlib.sha256(data).digest()[:16]
        example.images.append(_Row(member.path, member.offset, member.size, member.crc, digest, image_size, kind))
    else:
        rejected.append(RejectedFile(member.path, "neither an image nor a label", other=True))


class _Table:
    """Rows on their way to columns."""

    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._keys: list[str] = []
        self._labels: list[tuple[int, int]] = []
        self._names: dict[str, int] = {}

    def add(self, key: str, example: _Example, rejected: list[RejectedFile]) -> None:
        """
        Raises:
            UnusableImageError: the members of this key make no example.
        """
        row = _only_image(key, example, rejected)
        if row is None:
            return
        label = _label(example.labels)
        if isinstance(label, int):
            self._labels.append((NUMBER, label))
        elif isinstance(label, str):
            self._labels.append((NAME, self._names.setdefault(label, len(self._names))))
        elif "/" in row.path:
            folder = row.path.partition("/")[0]
            self._labels.append((FOLDER, self._names.setdefault(folder, len(self._names))))
        else:
            self._labels.append((FOLDER, -1))
        self._rows.append(row)
        self._keys.append(key)

    def index(
        self,
        shard: str,
        version: str,
        size: int,
        notes: tuple[tuple[str, str], ...],
        rejected: tuple[RejectedFile, ...],
    ) -> ShardIndex:
        rows = self._rows
        labels = np.asarray(self._labels, dtype=np.int32).reshape(-1, 2)
        return ShardIndex(
            shard=shard,
            version=version,
            bytes=size,
            paths=PackedNames.of([row.path for row in rows]),
            keys=PackedNames.of(self._keys),
            offset=np.asarray([row.offset for row in rows], dtype=np.int64),
            size=np.asarray([row.size for row in rows], dtype=np.int64),
            crc=np.asarray([row.crc for row in rows], dtype=np.uint32),
            digest=np.frombuffer(b"".join(row.digest for row in rows), np.uint64).reshape(-1, 2),
            image_size=np.asarray([row.image_size for row in rows], dtype=np.int32).reshape(-1, 2),
            source=labels[:, 0].copy(),
            label=labels[:, 1].copy(),
            label_names=tuple(self._names),
            kinds=tuple(sorted(Counter(row.kind for row in rows).items())),
            notes=notes,
            rejected=rejected,
        )


def _only_image(key: str, example: _Example, rejected: list[RejectedFile]) -> _Row | None:
    """The image of a key; None where it was rejected already."""
    rows = example.images
    if not rows:
        if not example.broken:
            raise UnusableImageError("a label without an image")
        return None
    if len(rows) > 1:
        # `KEY.jpg` beside `KEY.mask.png`: what has a word of its own is something else than the image.
        plain = [row for row in rows if "." not in key_of(row.path)[1]]
        if len(plain) != 1:
            raise UnusableImageError(f"{len(rows)} images of the key {key!r}, which is the name up to its first dot")
        rejected.extend(
            RejectedFile(row.path, "another image of the same key", other=True) for row in rows if row is not plain[0]
        )
        rows = plain
    return rows[0]


def _label(labels: Sequence[tuple[str, bytes]]) -> int | str | None:
    found: list[tuple[str, int | str]] = []
    for path, data in labels:
        value = _number(path, data) if path.lower().endswith(".cls") else _of_record(path, data)
        if value is not None:
            found.append((path, value))
    if len({value for _, value in found if isinstance(value, int)}) > 1:
        raise UnusableImageError("two labels: " + ", ".join(f"{value} in {path!r}" for path, value in found))
    numbers = [value for _, value in found if isinstance(value, int)]
    return numbers[0] if numbers else found[0][1] if found else None


def _number(path: str, data: bytes) -> int:
    text = data[:40].decode("ascii", "replace").strip()
    if not (text.isascii() and text.isdecimal() and int(text) < _MAX_LABEL):
        raise UnusableImageError(f"the label {text!r} in {path!r} is no whole number from 0 to {_MAX_LABEL - 1:,}")
    return int(text)


def _of_record(path: str, data: bytes) -> int | str | None:
    if len(data) > _MAX_RECORD_BYTES:
        raise UnusableImageError(f"{path!r} has {len(data):,} bytes; a label needs fewer than {_MAX_RECORD_BYTES:,}")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise UnusableImageError(f"{path!r} is no JSON") from None
    if not isinstance(record, dict):
        raise UnusableImageError(f"{path!r} holds no record, but {type(record).__name__}")
    value = next((record[key] for key in _LABEL_KEYS if key in record), None)
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_LABEL:
        raise UnusableImageError(f"the label {value!r} in {path!r} is neither a whole number nor a name")
    return value
