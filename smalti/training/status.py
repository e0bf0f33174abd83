"""How a run ended, for whoever starts it again: one small file in the run folder, and no other of its kind.

`torchrun` ends with 1 whatever the reason, so that an exit code tells a launcher nothing; these files do. None of them
means that the run goes on, or died without a word: start it again.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from smalti.checkpoints.lock import RunLock
from smalti.errors import PreemptedError, RunLockedError, SmaltiError, StorageError
from smalti.storage.filesystem import FileSystem, LocalFileSystem, storage_errors
from smalti.storage.replacing import replace_file

PREEMPTED, FAILED, FINISHED = "PREEMPTED", "FAILED", "FINISHED"
_MARKS = {PREEMPTED, FAILED, FINISHED}
# Settings, data or checkpoints that are wrong, numbers that are not finite, a folder in use: the same again next time.
NOT_RETRIED = (64, 65, 70, 73)


@dataclass(frozen=True)
class RunStatus:
    """What a run folder says of its last start.

    Args:
        kind: preempted = stopped on request, saved, and continued by the same command; failed = an error with a clear
            message; finished; open = running, or killed without notice, or never started.
        values: the file's lines, `name: value`: step, signal, exit_code, retry (yes, no), message, time (UTC).
    """

    kind: Literal["open", "preempted", "failed", "finished"]
    values: dict[str, str] = field(default_factory=dict)

    @property
    def retry(self) -> bool:
        """Whether starting it again may help."""
        return self.kind != "finished" and self.values.get("retry", "yes") == "yes"


def mark_running(folder: Path, fs: FileSystem | None = None, *, begun: bool = True) -> None:
    """A start: what the run folder says of earlier ones is taken away. The caller holds the `RunLock`.

    Args:
        begun: False = the start may still be refused, and FINISHED stays for now.

    Raises:
        StorageError: the disk refuses.
    """
    files = LocalFileSystem() if fs is None else fs
    with storage_errors(files, folder, 0, "clearing the mark of the last start", "Check the permissions of the folder"):
        for name in _MARKS if begun else _MARKS - {FINISHED}:
            with contextlib.suppress(FileNotFoundError):
                files.remove_file(folder / name)


def mark_preempted(folder: Path, step: int, signal_name: str, fs: FileSystem | None = None) -> None:
    """Saved at `step` and stopped because of a signal; the same command continues.

    Raises:
        StorageError: the disk refuses.
    """
    _write(folder, PREEMPTED, {"step": str(step), "signal": signal_name}, fs)


def mark_failed(folder: Path, error: SmaltiError, fs: FileSystem | None = None, *, since: float = 0.0) -> None:
    """Ended by an error that the user can mend.

    Of several processes each may call this: the word of one that names a cause stands against those that only noticed
    that another was gone.

    Args:
        since: when this start of the run began, in seconds since the epoch; the words of others do not stand.

    Raises:
        StorageError: the disk refuses.
    """
    with storage_errors(LocalFileSystem(), folder, 0, "reading the mark of another process", "Check its permissions"):
        before = read_status(folder)
        told = (folder / FAILED).stat().st_mtime if before.kind == "failed" else 0.0
    if before.kind == "failed" and not before.retry and told >= since:
        return
    retry = "no" if error.exit_code in NOT_RETRIED else "yes"
    message = " ".join(str(error).split())
    _write(folder, FAILED, {"exit_code": str(error.exit_code), "retry": retry, "message": message}, fs)


def mark_finished(folder: Path, step: int, fs: FileSystem | None = None) -> None:
    """All steps done and the model written.

    Raises:
        StorageError: the disk refuses.
    """
    _write(folder, FINISHED, {"step": str(step)}, fs)


def mark_refused(folder: Path, error: SmaltiError, *, since: float = 0.0) -> None:
    """As `mark_failed`, for errors before the run holds its folder, such as settings that do not fit.

    Nothing is written where the folder does not exist, where another run holds it, where a run has finished, and where
    the disk refuses: the error itself is on its way to the user, and what a run has is worth more than a mark.
    """
    if not folder.is_dir() or isinstance(error, RunLockedError) or read_status(folder).kind == "finished":
        return
    with contextlib.suppress(RunLockedError, StorageError), RunLock(folder):
        mark_failed(folder, error, since=since)


@contextmanager
def marked_failures(folder: Path, begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Errors of the body that a user can mend leave their mark, inside the `RunLock`; a request to stop is none.

    Args:
        begun: whether this start has gone on with the run. One that was refused before takes no run's FINISHED away.
    """
    try:
        yield
    except PreemptedError:
        raise
    except SmaltiError as error:
        if begun() or read_status(folder).kind != "finished":
            with contextlib.suppress(StorageError):  # on a full disk the first error is the one to tell
                mark_failed(folder, error)
        raise


def read_status(folder: Path) -> RunStatus:
    """What the run folder says; open where it says nothing."""
    kinds: dict[str, Literal["preempted", "failed", "finished"]]
    kinds = {FAILED: "failed", PREEMPTED: "preempted", FINISHED: "finished"}
    for name, kind in kinds.items():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
            return RunStatus(kind, dict(line.split(": ", 1) for line in lines if ": " in line))
    return RunStatus("open")


def _write(folder: Path, name: str, values: dict[str, str], fs: FileSystem | None) -> None:
    files = LocalFileSystem() if fs is None else fs
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    data = "".join(f"{key}: {value}\n" for key, value in (values | {"time": now}).items()).encode()
    advice = "Checkpoints stored before are untouched"
    with storage_errors(files, folder, len(data), f"writing the mark {name}", advice):
        replace_file(files, folder / name, [data])
        for other in _MARKS - {name}:  # one word at a time, the last
            with contextlib.suppress(FileNotFoundError):
                files.remove_file(folder / other)
