"""The stored index of a folder of images: what was found in each file, and how the file looked from outside then."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from smalti.data.folder_pass import FolderIndex, IndexEntry, Known, RejectedFile, Stamp
from smalti.data.index_file import PackedNames, StoredIndex, cache_folder, read_index, write_index
from smalti.errors import StorageError

FORMAT, VERSION = "folder", 1
BESIDE = ".smalti-index"
_FILE = "folder.index"


def index_path(root: Path) -> Path:
    """Where the index of a folder is kept on this machine; with it, whether one is kept at all."""
    folder = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    return cache_folder() / "indices" / folder / _FILE


def read_known(root: Path) -> Known | None:
    """What an earlier pass found, from the cache or else from the folder itself; None if nothing whole is stored."""
    for path in (index_path(root), root / BESIDE / _FILE):
        found = read_index(path)
        if found is not None and (found.facts.get("format"), found.facts.get("version")) == (FORMAT, VERSION):
            # A digest is no signature: an index may be a stranger's, copied together with his images.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, IndexError):
                return _known_of(found)
    return None


def write_known(root: Path, index: FolderIndex, *, beside: bool = False) -> Path:
    """Keep what a pass found for the next one. Returns where.

    Args:
        beside: in the folder itself, for everybody who reads it, and not in the user's cache.

    Raises:
        StorageError: the disk refuses.
    """
    path = root / BESIDE / _FILE if beside else index_path(root)
    try:
        write_index(path, _stored(index.known))
    except StorageError as error:
        raise StorageError(f"{error}; set XDG_CACHE_HOME to a folder that can be written to") from error
    return path


def _stored(known: Known) -> StoredIndex:
    entries = [(stamp, entry) for stamp, entry in known.values() if isinstance(entry, IndexEntry)]
    rejected = [(*stamp, r.path, r.reason, r.other) for stamp, r in known.values() if isinstance(r, RejectedFile)]
    kinds = {kind: i for i, kind in enumerate(sorted({(e.format, e.mode) for _, e in entries}))}
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "kinds": list(kinds),
        "notes": {str(i): e.notes for i, (_, e) in enumerate(entries) if e.notes},
        "rejected": rejected,
    }
    columns: dict[str, np.ndarray] = {
        "stamp": np.asarray([stamp for stamp, _ in entries], dtype=np.int64).reshape(-1, 3),
        "kind": np.asarray([kinds[e.format, e.mode] for _, e in entries], dtype=np.int32),
        "image_size": np.asarray([e.image_size for _, e in entries], dtype=np.int32).reshape(-1, 2),
        "class_label": np.asarray([e.class_label for _, e in entries], dtype=np.int64),
        "sha256": np.frombuffer(bytes.fromhex("".join(e.sha256 for _, e in entries)), np.uint8).reshape(-1, 32),
    }
    return StoredIndex(facts, columns, {"paths": PackedNames.of([e.path for _, e in entries])})


def _known_of(found: StoredIndex) -> Known:
    facts, columns = found.facts, found.columns
    kinds, notes = facts["kinds"], facts["notes"]
    if bool((columns["image_size"] < 1).any()) or bool((columns["kind"] < 0).any()):
        raise ValueError("images of no size or kind")
    digests = columns["sha256"].tobytes().hex()
    rows = zip(
        found.names["paths"],
        columns["stamp"].tolist(),
        columns["kind"].tolist(),
        columns["image_size"].tolist(),
        columns["class_label"].tolist(),
        strict=True,
    )
    known: dict[str, tuple[Stamp, IndexEntry | RejectedFile]] = {}
    for i, (path, stamp, kind, (high, wide), label) in enumerate(rows):
        entry = IndexEntry(
            path=path,
            size=stamp[0],
            mtime_ns=stamp[1],
            sha256=digests[64 * i : 64 * i + 64],
            format=kinds[kind][0],
            mode=kinds[kind][1],
            image_size=(high, wide),
            class_label=label,
            notes=tuple(notes.get(str(i), ())),
        )
        known[path] = Stamp(*stamp), entry
    for size, mtime_ns, ctime_ns, path, reason, other in facts["rejected"]:
        if not (isinstance(path, str) and isinstance(reason, str)):
            raise ValueError("a rejected file without a name")
        known[path] = Stamp(size, mtime_ns, ctime_ns), RejectedFile(path, reason, other)
    return known
