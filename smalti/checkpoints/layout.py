"""What a checkpoint folder holds, what it is called, and how to know that it is whole."""

import errno
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smalti.checkpoints.patience import patiently
from smalti.checkpoints.shards import Entry, StoredCheckpoint, index_of_files, parse_index, untiled
from smalti.errors import CheckpointError
from smalti.storage.filesystem import FileRecord, read_record
from smalti.storage.process import Process
from smalti.storage.sealed import check_format, unseal
from smalti.world import World

FORMAT, VERSION = "smalti-checkpoint", 2  # 1 had whole tensors only, no index, and no run_id

MANIFEST = "manifest.json"
STATE, INDEX, LATEST = "state.json", "index.json", "LATEST"
GROUP = re.compile(r"[a-z][a-z0-9_]*")
FILE = re.compile(r"state\.json|index\.json|(?P<group>[a-z][a-z0-9_]*)(\.rank-\d{4,6})?\.safetensors")
STEP = re.compile(r"step-(\d{10})")
# What a writer leaves when it dies: a checkpoint half written, one half deleted, one that made room for its successor.
UNFINISHED = re.compile(r"\.tmp-\d{10}-(?P<writer>[0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}")
DELETED = re.compile(r"\.tmp-del-.*")
ASIDE = re.compile(r"\.old-(?P<step>\d{10})-(?P<writer>[0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}")


def name_of(step: int) -> str:
    """A checkpoint's folder."""
    return f"step-{step:010d}"


def nonce() -> str:
    """Marks what this process has begun, so that others can tell whether it is still at it."""
    return f"{Process.current().token}-{secrets.token_hex(4)}"


def verify_folder(
    path: Path, *, share: World | None = None, late: bool = False, digest: str | None = None
) -> dict[str, Any]:
    """The manifest of a checkpoint folder whose files are as it says.

    Args:
        share: of several processes each reads a part of the large files.
        late: another machine has just seen it, so that what is missing here is only late.
        digest: sha256 that the manifest has; what has another one is an older checkpoint that still shows.

    Raises:
        CheckpointError: something is missing or changed.
        NewerFormatError: a newer smalti wrote it.
        OSError: it cannot be read.
    """
    where = path / MANIFEST
    if not late and not where.exists():
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a whole checkpoint")

    def read() -> bytes:
        data = where.read_bytes()
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise FileNotFoundError(errno.ENOENT, "is not the manifest that was written", str(where))
        return data

    data = patiently(read, late=late)
    manifest = unseal(data, str(where))
    check_format(manifest, FORMAT, VERSION, str(where))
    files = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    for name in files:
        if not FILE.fullmatch(name):
            raise CheckpointError(f"{where} names the file {name!r}, which no checkpoint has")
    for name in _shared_out(files, World() if share is None else share):
        _check_file(path / name, files[name], late=late)
    return manifest | {"digest": hashlib.sha256(data).hexdigest()}


def _shared_out(files: Mapping[str, FileRecord], world: World) -> list[str]:
    """This process's files: the largest first, each to whom has least; the small ones, which all need, to all."""
    loads = [0] * world.size
    mine = [name for name in files if name in (STATE, INDEX)]
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        if name not in mine:
            rank = loads.index(min(loads))
            loads[rank] += files[name].bytes
            if rank == world.rank:
                mine.append(name)
    return mine


def open_folder(path: Path, manifest: Mapping[str, Any], *, late: bool) -> StoredCheckpoint:
    """A checkpoint whose files are known to be as they were written."""
    groups = {m["group"]: path / name for name in manifest["files"] if (m := FILE.fullmatch(name)) and m["group"]}
    try:
        if manifest["version"] == 1:
            index = index_of_files(groups)
        else:
            index = parse_index(json.loads(patiently((path / INDEX).read_bytes, late=late)))
        state = json.loads(patiently((path / STATE).read_bytes, late=late))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {INDEX} or {STATE} is not what its manifest promises: {error}") from error
    for group, entries in index.items():
        for name, entry in entries.items():
            if gap := untiled(entry) or _elsewhere(entry, manifest["files"]):
                raise CheckpointError(f"{path / INDEX}: {group}.{name} is not whole: {gap}")
    return StoredCheckpoint(
        manifest["step"],
        state,
        path,
        index,
        run_id=manifest.get("run_id"),
        score=manifest.get("score"),
        late=late,
    )


def _check_file(path: Path, expected: FileRecord, *, late: bool) -> None:
    if not late and not path.exists():
        raise CheckpointError(f"{path} is missing")
    size = patiently(lambda: path.stat().st_size, late=late)
    if size != expected.bytes:
        raise CheckpointError(f"{path} has {size:,} bytes, its manifest says {expected.bytes:,}: it was cut or changed")
    if patiently(lambda: read_record(path), late=late) != expected:
        raise CheckpointError(f"{path} is damaged: its bytes are not the ones that were written (sha256 differs)")


def _elsewhere(entry: Entry, files: Mapping[str, Any]) -> str:
    """A file that the index names and the manifest does not; empty if there is none."""
    return next((f"{part.file} is no file of this checkpoint" for part in entry.slices if part.file not in files), "")
