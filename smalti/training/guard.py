"""Which steps may change the weights. Judged by numbers that all processes share, so that all decide alike."""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from smalti.errors import NumericError, StorageError
from smalti.storage.filesystem import FileSystem, LocalFileSystem, make_folders, storage_errors
from smalti.storage.replacing import replace_file
from smalti.storage.sealed import check_format, seal, smalti_version, unseal
from smalti.training.config import GuardConfig

WINDOW = 1000  # steps that `skip_budget` is about
NORMS, ENOUGH_NORMS = 100, 20  # what the running median is taken of, and how many it needs to say anything
REWINDS = "rewinds.json"
_FORMAT, _VERSION = "smalti-rewinds", 1


class Guard:
    """Judges each step by its loss and gradient norm, and keeps count of those left out.

    A norm that is a spike enters the running median no more than one that is not finite: a run of spikes cannot raise
    the bar for the next.

    Args:
        folder: the run folder, where rewinds and the last report of a run that gives up are written; None = nowhere.
            Of several processes, one has it.
        fs: the file operations; tests put failures here.

    Raises:
        CheckpointError: what the folder says of earlier rewinds is damaged.
    """

    def __init__(self, config: GuardConfig, folder: Path | None = None, *, fs: FileSystem | None = None) -> None:
        self.config = config
        self.folder = folder
        self._fs: FileSystem = LocalFileSystem() if fs is None else fs
        self._skipped: tuple[int, ...] = ()
        self._records: tuple[dict[str, Any], ...] = ()
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._rewinds: tuple[int, ...] = () if folder is None else _read_rewinds(folder / REWINDS)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Steps that changed no weight, in order; those left out after a rewind are among them."""
        return self._skipped

    @property
    def rewinds(self) -> tuple[int, ...]:
        """Steps whose batch a rewind has taken out of the run, in order of the steps."""
        return self._rewinds

    def adopt(self, rewinds: Sequence[int]) -> None:
        """Take the rewinds of the process that has the folder; for the other processes, when a run starts."""
        self._rewinds = tuple(sorted({*self._rewinds, *rewinds}))

    def judge(self, step: int, loss: float, norm: float, positions: range) -> Literal["step", "skip", "rewind"]:
        """What to do with the gradients of a step.

        Args:
            step: counted from 0, as `TrainState.step` before it advances.
            loss: of the whole batch, reduced over all processes.
            norm: of the whole gradient, before clipping, likewise.
            positions: of the batch in the run's order of samples.

        Returns:
            step = update the weights; skip = leave them, the average and the optimizer as they are, and go on;
            rewind = stop here, return to the newest checkpoint, and pass over this batch when its turn comes.

        Raises:
            NumericError: too many of the last 1000 steps were left out. What is known of them has been written to the
                folder.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        limit = self._limit()
        if finite and norm <= limit:
            self._norms.append(norm)
            return "step"
        rewind = finite and self.config.on_spike == "rewind"
        reason = f"norm above {limit:.6g}" if finite else "not finite"
        self._note(step, loss, norm, positions, reason)
        self._check_budget(step)
        if not rewind:
            return "skip"
        self._rewinds = tuple(sorted({*self._rewinds, step}))
        self._store_rewinds()
        return "rewind"

    def passes_over(self, step: int) -> bool:
        """Whether a rewind has taken this step's batch out: nothing is computed, and the step counts as skipped.

        Raises:
            NumericError: as `judge`.
        """
        if step not in self._rewinds:
            return False
        if step not in self._skipped:
            self._note(step, None, None, None, "passed over after a rewind")
            self._check_budget(step)
        return True

    def counters(self) -> dict[str, Any]:
        """Everything that later decisions depend on, in JSON types that keep every bit."""
        return {
            "skipped": list(self._skipped),
            "guard": {"norms": list(self._norms), "records": list(self._records), "rewinds": list(self._rewinds)},
        }

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Become what `counters` said; rewinds known since then stay, as they are what one goes back for.

        Also reads what runs stored before there was a median: the skipped steps alone.
        """
        kept: Mapping[str, Any] = counters.get("guard", {"norms": [], "records": [], "rewinds": []})
        self._skipped = tuple(int(step) for step in counters["skipped"])
        self._norms = deque((float(norm) for norm in kept["norms"]), maxlen=NORMS)
        self._records = tuple(dict(record) for record in kept["records"])
        self.adopt([int(step) for step in kept["rewinds"]])

    def _limit(self) -> float:
        """Norms above this are a spike."""
        factor = self.config.spike_factor
        if factor is None or len(self._norms) < ENOUGH_NORMS:
            return math.inf
        return max(factor * statistics.median(self._norms), self.config.spike_floor)

    def _note(self, step: int, loss: float | None, norm: float | None, positions: range | None, reason: str) -> None:
        self._skipped = (*self._skipped, step)
        record = {
            "step": step,
            "loss": _number(loss),
            "norm": _number(norm),
            "positions": None if positions is None else [positions.start, positions.stop],
            "reason": reason,
        }
        self._records = (*(r for r in self._records if r["step"] > step - WINDOW), record)

    def _check_budget(self, step: int) -> None:
        # Those that a rewind took out are among them as soon as they are passed over: rewinds cannot go on for ever.
        recent = [skipped for skipped in self._skipped if skipped > step - WINDOW]
        if len(recent) <= self.config.skip_budget:
            return
        written = self._write_report(step, recent)
        raise NumericError(
            f"{len(recent)} of the last {WINDOW} steps had a loss or gradient that is not finite, or a spike (steps "
            f"{', '.join(map(str, recent))}); the weights are those before them. Lower the learning rate, clip "
            f"gradients (--optimizer.clip-norm 1) or train in fp32{written}"
        )

    def _write_report(self, step: int, recent: Iterable[int]) -> str:
        """What is known of the steps left out, for whoever looks into it; returns where it is, as the message says."""
        if self.folder is None:
            return ""
        path = self.folder / f"numeric-error-{step:010d}.json"
        known = {record["step"]: record for record in self._records}
        report = {
            "smalti": smalti_version(),
            "step": step,
            "skipped": [known.get(s, {"step": s}) for s in recent],
            "recent_norms": list(self._norms),
            "rewinds": list(self._rewinds),
        }
        try:
            self._replace(path, (json.dumps(report, indent=1) + "\n").encode(), "writing the report on skipped steps")
        except StorageError as error:  # the numbers are what stopped the run; a full disk comes second
            return f". No report: {error}"
        return f". The samples and norms of these steps are in {path}"

    def _store_rewinds(self) -> None:
        if self.folder is None:
            return
        document = {"format": _FORMAT, "version": _VERSION, "smalti": smalti_version(), "steps": list(self._rewinds)}
        self._replace(self.folder / REWINDS, seal(document), "storing which batch a rewind leaves out")

    def _replace(self, path: Path, data: bytes, what: str) -> None:
        advice = "Checkpoints stored before are untouched; make room and run again"
        with storage_errors(self._fs, path.parent, len(data), what, advice):
            make_folders(self._fs, path.parent)
            replace_file(self._fs, path, [data])


def _read_rewinds(path: Path) -> tuple[int, ...]:
    if not path.exists():
        return ()
    document = unseal(path.read_bytes(), str(path))
    check_format(document, _FORMAT, _VERSION, str(path))
    return tuple(int(step) for step in document["steps"])


def _number(value: float | None) -> float | str | None:
    """As JSON has it: numbers that are not finite have no sign there but their name."""
    return value if value is None or math.isfinite(value) else repr(value)
