"""Checkpoints of a training run: written so that a kill, a power cut or a full disk never costs a stored one.

A checkpoint is a folder `step-0000000100` with one safetensors file per group of tensors, `state.json`, and
`manifest.json`, which names every file with its size and hash. It is written under another name, synced, and renamed
when whole; hence a reader takes the newest folder whose manifest fits, and needs to trust nothing else.
"""

import contextlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smalti.errors import CheckpointError, StorageError
from smalti.storage.filesystem import (
    FileRecord,
    FileSystem,
    LocalFileSystem,
    make_folders,
    read_record,
    remove_tree,
    require_space,
    storage_errors,
    write_file,
)
from smalti.storage.process import Process, is_dead
from smalti.storage.sealed import NewerFormatError, check_format, seal, smalti_version, unseal
from smalti.storage.tensors import file_pieces, file_size, read_tensors, refuse_non_finite

FORMAT, VERSION = "smalti-checkpoint", 1

_MANIFEST, _STATE, _LATEST = "manifest.json", "state.json", "LATEST"
_GROUP = re.compile(r"[a-z][a-z0-9_]*")
_FILE = re.compile(r"state\.json|([a-z][a-z0-9_]*)\.safetensors")
_STEP = re.compile(r"step-(\d{10})")
# What a writer leaves when it dies: a checkpoint half written, one half deleted, one that made room for its successor.
_UNFINISHED = re.compile(r"\.tmp-\d{10}-(?P<writer>[0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}")
_DELETED = re.compile(r"\.tmp-del-.*")
_ASIDE = re.compile(r"\.old-(?P<step>\d{10})-(?P<writer>[0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}")


@dataclass(frozen=True)
class StoredCheckpoint:
    """What `save` was given, read back; tensors are on the CPU."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: made when the first checkpoint is saved.
        keep_last: how many of the newest steps stay.
        keep_every: steps divisible by this stay for good; None = only the newest.
        fs: the file operations; tests put failures here.
        sole_writer: the caller holds the `RunLock` of the run, so what other machines left behind is dead as well.

    Raises:
        ValueError: keep_last or keep_every is below 1.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        fs: FileSystem | None = None,
        sole_writer: bool = False,
    ) -> None:
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last {keep_last} and keep_every {keep_every} must be at least 1")
        self.folder = Path(folder)
        self.keep_last, self.keep_every = keep_last, keep_every
        self.sole_writer = sole_writer
        self._fs: FileSystem = LocalFileSystem() if fs is None else fs
        self._turn = threading.Lock()  # a second save waits for the first

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Store one checkpoint; when this returns, it survives a power cut. Then old ones are deleted.

        Args:
            step: 0 to 9,999,999,999. A checkpoint of the same step is replaced.
            tensors: groups by name (`model`, `ema`, `optimizer`), each a dict of tensors on any device.
            state: what else a resume needs, in the types that JSON has.

        Raises:
            NumericError: a tensor is not finite; nothing is written or deleted.
            StorageError: the disk is full or refuses; the checkpoints stored before are untouched.
            ValueError, TypeError: a step, group name, dtype or state that cannot be stored.
        """
        if not 0 <= step < 10**10:
            raise ValueError(f"step {step} is outside 0 .. 9,999,999,999")
        if bad := [group for group in tensors if not _GROUP.fullmatch(group)]:
            raise ValueError(f"group name {bad[0]!r}: use small letters, digits and underscores")
        what = f"storing checkpoint {_name(step)}"
        for group, members in tensors.items():
            refuse_non_finite(members, f"checkpoint {_name(step)}, group {group!r}")
        state_bytes = (json.dumps(dict(state), indent=1) + "\n").encode()
        needed = sum(file_size(members) for members in tensors.values()) + len(state_bytes) + 4096
        advice = "Checkpoints stored before are untouched; make room and run again"
        with self._turn:
            with storage_errors(self._fs, self.folder, needed, what, advice):
                make_folders(self._fs, self.folder)
                self._sweep()
                require_space(self._fs, self.folder, needed, f"checkpoint {_name(step)}")
                path = self._write(step, tensors, state_bytes)
            advice = f"Checkpoint {_name(step)} itself is stored; what failed is the tidying after it"
            with storage_errors(self._fs, self.folder, needed, f"tidying up after {_name(step)}", advice):
                self._delete_old(step)
                self._write_hint(step)
        return path

    def load_newest(self, on_skip: Callable[[str], None]) -> StoredCheckpoint | None:
        """The newest checkpoint that is whole, or None if there is none.

        Args:
            on_skip: told, in one line with name and reason, of each newer one that is not.

        Raises:
            CheckpointError: the newest whole one was written by a newer smalti. Falling back to an older one would
                soon delete it.
        """
        for step in reversed(self._all_steps()):
            for path in self._places(step):
                try:
                    return self._read(path, step)
                except NewerFormatError:
                    raise
                except (CheckpointError, OSError) as error:
                    on_skip(f"checkpoint {path.name} is skipped: {error}")
        return None

    def load(self, step: int) -> StoredCheckpoint:
        """The checkpoint of one step.

        Raises:
            CheckpointError: it does not exist or is damaged.
        """
        places = self._places(step)
        if not places:
            have = ", ".join(map(str, self._all_steps())) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has: {have}")
        problems = []
        for path in places:
            try:
                return self._read(path, step)
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
        raise CheckpointError(f"{problems[0]}; choose another step: {', '.join(map(str, self._all_steps()))}")

    def steps(self) -> list[int]:
        """Steps with a stored checkpoint, smallest first; whether each is whole, `verify` tells."""
        return sorted(int(match[1]) for name in self._names() if (match := _STEP.fullmatch(name)))

    def verify(self, path: Path) -> None:
        """Read every byte of a checkpoint folder and compare with its manifest.

        Raises:
            CheckpointError: something is missing or changed.
        """
        try:
            self._read_manifest(Path(path))
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error

    def sweep(self) -> None:
        """Clear away what dead writers left; every `save` begins with it.

        Raises:
            StorageError: the disk refuses.
        """
        with (
            self._turn,
            storage_errors(self._fs, self.folder, 0, "clearing leftovers", "Check the permissions of the folder"),
        ):
            self._sweep()

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state_bytes: bytes) -> Path:
        fs, final, nonce = self._fs, self.folder / _name(step), _nonce()
        temporary = self.folder / f".tmp-{step:010d}-{nonce}"
        aside = self.folder / f".old-{step:010d}-{nonce}"
        try:
            fs.make_folder(temporary)
            files: dict[str, FileRecord] = {}
            for group, members in tensors.items():
                name = f"{group}.safetensors"
                files[name] = write_file(fs, temporary / name, file_pieces(members))
            files[_STATE] = write_file(fs, temporary / _STATE, [state_bytes])
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "smalti": smalti_version(),
                "step": step,
                "files": {name: record._asdict() for name, record in files.items()},
            }
            write_file(fs, temporary / _MANIFEST, [seal(manifest)])
            fs.sync_folder(temporary)
            replaces = final.exists()
            if replaces:
                fs.rename(final, aside)
            fs.rename(temporary, final)
            fs.sync_folder(self.folder)
        except BaseException:
            # Best effort: what stays is cleared by the next sweep, and readers know the name `.old-` too.
            with contextlib.suppress(OSError):
                if aside.exists() and not final.exists():
                    fs.rename(aside, final)
                remove_tree(fs, temporary)
            raise
        return final

    def _delete_old(self, newest: int) -> None:
        steps = self.steps()
        kept = {newest, *steps[-self.keep_last :]}
        if self.keep_every is not None:
            kept |= {step for step in steps if step % self.keep_every == 0}
        victims = [self.folder / _name(step) for step in steps if step not in kept]
        victims += [self.folder / name for name in self._names() if (m := _ASIDE.fullmatch(name)) and self._done(m)]
        if not victims:
            return
        try:
            self.verify(self.folder / _name(newest))
        except CheckpointError as error:
            raise StorageError(
                f"{error}. It was just written, so the disk does not keep what it is given; no older checkpoint is "
                "deleted. Check the disk or choose another one"
            ) from error
        self._discard(victims)

    def _done(self, aside: re.Match[str]) -> bool:
        """Whether a replaced checkpoint's successor stands, and was put there by this process."""
        return aside["writer"] == Process.current().token and (self.folder / _name(int(aside["step"]))).exists()

    def _discard(self, folders: list[Path]) -> None:
        graves = []
        for folder in folders:
            grave = self.folder / f".tmp-del-{folder.name.lstrip('.')}-{secrets.token_hex(4)}"
            self._fs.rename(folder, grave)
            graves.append(grave)
        if graves:
            # Else a power cut could bring back the name of a checkpoint without its files.
            self._fs.sync_folder(self.folder)
        for grave in graves:
            remove_tree(self._fs, grave)

    def _write_hint(self, step: int) -> None:
        """LATEST is for people and scripts; no reader here trusts it."""
        temporary = self.folder / f".tmp-del-{_LATEST}-{secrets.token_hex(4)}"  # so that any sweep may take it
        write_file(self._fs, temporary, [f"{_name(step)}\n".encode()])
        self._fs.rename(temporary, self.folder / _LATEST)
        self._fs.sync_folder(self.folder)

    def _sweep(self) -> None:
        for name in self._names():
            path = self.folder / name
            if _DELETED.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):  # another process may sweep as well
                    remove_tree(self._fs, path) if path.is_dir() else self._fs.remove_file(path)
            elif (match := _UNFINISHED.fullmatch(name)) and self._is_dead(match["writer"]):
                remove_tree(self._fs, path)
            elif (match := _ASIDE.fullmatch(name)) and self._is_dead(match["writer"]):
                self._settle(path, self.folder / _name(int(match["step"])))

    def _settle(self, aside: Path, final: Path) -> None:
        """A writer died between moving a checkpoint aside and tidying up: keep whichever of the two is whole."""
        if final.exists():
            try:
                self.verify(final)
            except CheckpointError:
                self._discard([final])
            else:
                self._discard([aside])
                return
        self._fs.rename(aside, final)
        self._fs.sync_folder(self.folder)

    def _is_dead(self, writer: str) -> bool:
        dead = is_dead(writer)
        return self.sole_writer if dead is None else dead

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []

    def _all_steps(self) -> list[int]:
        """Also those that stand aside because their writer died while replacing them."""
        asides = {int(match["step"]) for name in self._names() if (match := _ASIDE.fullmatch(name))}
        return sorted(asides.union(self.steps()))

    def _places(self, step: int) -> list[Path]:
        asides = [name for name in self._names() if (m := _ASIDE.fullmatch(name)) and int(m["step"]) == step]
        return [path for path in (self.folder / name for name in (_name(step), *asides)) if path.exists()]

    def _read(self, path: Path, step: int) -> StoredCheckpoint:
        manifest = self._read_manifest(path)
        if manifest["step"] != step:
            raise CheckpointError(f"{path} is the checkpoint of step {manifest['step']} under another name")
        groups = [match[1] for name in manifest["files"] if (match := _FILE.fullmatch(name)) and match[1]]
        tensors = {group: read_tensors(path / f"{group}.safetensors") for group in groups}
        state = json.loads((path / _STATE).read_bytes())
        return StoredCheckpoint(step, tensors, state, path)

    def _read_manifest(self, path: Path) -> dict[str, Any]:
        where = path / _MANIFEST
        if not where.exists():
            raise CheckpointError(f"{path} has no {_MANIFEST}: it is not a whole checkpoint")
        manifest = unseal(where.read_bytes(), str(where))
        check_format(manifest, FORMAT, VERSION, str(where))
        for name, record in manifest["files"].items():
            if not _FILE.fullmatch(name):
                raise CheckpointError(f"{where} names the file {name!r}, which no checkpoint has")
            _check_file(path / name, FileRecord(**record))
        return manifest


def _check_file(path: Path, expected: FileRecord) -> None:
    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    size = path.stat().st_size
    if size != expected.bytes:
        raise CheckpointError(f"{path} has {size:,} bytes, its manifest says {expected.bytes:,}: it was cut or changed")
    if read_record(path) != expected:
        raise CheckpointError(f"{path} is damaged: its bytes are not the ones that were written (sha256 differs)")


def _name(step: int) -> str:
    return f"step-{step:010d}"


def _nonce() -> str:
    return f"{Process.current().token}-{secrets.token_hex(4)}"
