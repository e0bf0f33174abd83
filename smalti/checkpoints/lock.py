"""One writer per run folder."""

import contextlib
import fcntl
import json
import os
import time
import weakref
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from smalti.errors import RunLockedError, StorageError
from smalti.storage.filesystem import free_text
from smalti.storage.process import Process, is_dead

_FILE = ".lock"
_PATIENCE = 2.0  # seconds for the children of a killed holder to let go


class RunLock:
    """Hold a run folder for the length of a `with` block, against every other process.

    The kernel's file lock decides, and ends with the process that holds it, however that ends; what the file says is
    for people. Between machines that share a folder a file lock is not always heard, so a lock left by another machine
    is taken only on request.

    Args:
        steal: take over a lock that another machine left behind; only when its run is known to be over.

    Raises (on entering):
        RunLockedError: someone else holds the folder; the message says who.
        StorageError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, steal: bool = False) -> None:
        self.folder = Path(folder)
        self.steal = steal
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        if self._descriptor is not None:
            raise RuntimeError(f"{self.folder}: this RunLock is already held")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._cannot_lock(error) from error
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        # A forked child (a data loader's worker) inherits the lock, and would hold it on after its parent was killed.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(reference))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)  # an empty file says: left in good order
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = _read(descriptor)
            except OSError as error:
                raise self._cannot_lock(error) from error
            ended = holder is not None and is_dead(_process(holder).token) is True
            if not ended or time.monotonic() > deadline:
                rest = ", which has ended but left a process behind" if ended else ""
                raise RunLockedError(
                    f"run folder {self.folder} is being written by {_describe(holder)}{rest}; "
                    "wait until it ends, stop it, or choose another folder"
                )
            time.sleep(0.02)
        holder = _read(descriptor)
        if holder is not None and is_dead(_process(holder).token) is None and not self.steal:
            raise RunLockedError(
                f"run folder {self.folder} was left locked by {_describe(holder)}, which cannot be asked from here; "
                "if that run is over, start this one with --steal"
            )
        me = asdict(Process.current()) | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me).encode(), 0)
        except OSError as error:
            raise self._cannot_lock(error) from error

    def _cannot_lock(self, error: OSError) -> StorageError:
        return StorageError(
            f"run folder {self.folder} cannot be locked: {error.strerror}; {free_text(self.folder)}: make room, or "
            "choose a folder on a disk you may write to"
        )


def _forget(reference: "weakref.ref[RunLock]") -> None:
    lock = reference()
    if lock is not None and lock._descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(lock._descriptor)
        lock._descriptor = None


def _read(descriptor: int) -> dict[str, Any] | None:
    """What the holder wrote; None if it left in good order or was killed while writing."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        _process(holder)
    except (ValueError, KeyError, TypeError):
        return None
    return holder


def _process(holder: dict[str, Any]) -> Process:
    return Process(int(holder["pid"]), str(holder["host"]), str(holder["boot_id"]), int(holder["started"]))


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder.get('since', 'an unknown time')}"
