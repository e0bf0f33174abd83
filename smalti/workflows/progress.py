"""What a person sees while something long runs: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0


class ProgressReport:
    """Progress of one task in a `with` block; notes may be printed at any time without breaking the bar.

    Args:
        label: what is going on, a few words.
        total: units of work in all; `done` of them lie behind us.
        unit: of the rate, e.g. "steps".
        out: None = standard error.
    """

    def __init__(
        self, label: str, total: int, *, done: int = 0, unit: str = "steps", out: TextIO | None = None
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._first = self._done = done
        self._started = self._printed = time.monotonic()
        self._said_all = False
        self._console = Console(file=out or sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "ProgressReport":
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            tail = (TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
            self._bar = Progress(*columns, *tail, console=self._console, speed_estimate_period=120)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self._done, rate="", detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, detail: str = "") -> None:
        """`done` units lie behind us now."""
        self._done = done
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._started, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, rate=f"{_rate(rate)} {self.unit}/s", detail=detail)
        elif now - self._printed >= PLAIN_SECONDS or (done >= self.total and not self._said_all):
            self._printed, self._said_all = now, done >= self.total
            parts = [f"{self.label} {done:,}/{self.total:,}", f"{_rate(rate)} {self.unit}/s"]
            if self._said_all:
                parts.append(f"in {_clock(now - self._started)}")
            elif rate:
                parts.append(f"{_clock((self.total - done) / rate)} left")
            self._console.print(", ".join([*parts, *([detail] if detail else [])]), markup=False)

    def continue_from(self, done: int) -> None:
        """`done` units were there before we began; the rate counts from here."""
        self._first = self._done = done
        self._started = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def note(self, text: str) -> None:
        """One line above the bar."""
        (self._bar.console if self._bar is not None else self._console).print(text, markup=False)


def _rate(rate: float) -> str:
    """Three digits, as many as a person reads."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _clock(seconds: float) -> str:
    """0:07, 12:34, 5:06:07, and from two days on 3 days."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 2 * 24 * 60:
        return f"{minutes // (24 * 60):,} days"
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
