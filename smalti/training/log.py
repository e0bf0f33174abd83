"""What a run writes down: JSON lines always, TensorBoard where it is installed."""

import json
import threading
from pathlib import Path
from typing import Any

from smalti.errors import StorageError
from smalti.storage.filesystem import LocalFileSystem, free_text
from smalti.storage.replacing import replace_file


class RunLog:
    """`log.jsonl` in the run folder, one line per event, steps strictly rising per kind of event.

    Only `settings` may stand twice at a step, where a run was started again twice before it came further. A line goes
    to the system at once and not to the disk: a kill tears at most the last one, and no step waits for the disk.

    Args:
        step: the step that the run continues from, -1 for a fresh start; lines of later steps, and a line torn by a
            kill, are dropped.
        tensorboard: also write scalars to `tensorboard/`; the package must be installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        kept = [line for line in read_log(folder) if line["step"] <= step]
        try:
            data = "".join(json.dumps(line) + "\n" for line in kept).encode()
            replace_file(LocalFileSystem(), self.path, [data])  # else a power cut might leave no line at all
            self._file = self.path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._board, self._hook = None, threading.excepthook
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # heavy, optional

            threading.excepthook = self._told_later
            try:
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            except OSError as error:
                self._file.close()
                threading.excepthook = self._hook
                raise _cannot_write(folder / "tensorboard", error) from error

    def write(self, event: str, step: int, **values: Any) -> None:
        """One event: `train`, `validation`, `quality` (metrics) or `baseline`, with its numbers."""
        try:
            self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if self._board is not None:
            try:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(f"{event}/{name}", value, step)
            except OSError as error:  # of its thread, that wrote something earlier
                raise _cannot_write(self.path.with_name("tensorboard"), error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # what could not be written is tried again here
            raise _cannot_write(self.path, error) from error
        finally:
            if self._board is not None:
                try:
                    self._board.flush()  # `close` would not tell of what its thread failed with
                    self._board.close()
                except OSError as error:
                    raise _cannot_write(self.path.with_name("tensorboard"), error) from error
                finally:
                    threading.excepthook = self._hook

    def _told_later(self, failed: threading.ExceptHookArgs) -> None:
        """Without the traceback of TensorBoard's thread, whose error is raised by the next `write` or by `close`."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self._hook(failed)


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}; what was stored before is untouched, "
        f"{free_text(path.parent)}: make room or choose another --out"
    )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's log; one torn by a kill, or spoiled by a disk, is left out."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    lines = []
    for data in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(data)
        except ValueError:  # not JSON, or not even text
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def tensorboard_installed() -> bool:
    """Whether `pip install smalti[tensorboard]` has been done."""
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None
