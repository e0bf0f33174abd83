"""Files that are no longer what a checked pass found: a few are replaced, many stop the run."""

import threading
from dataclasses import dataclass, field
from typing import Any

from smalti.errors import DataError


class ChangedFileError(DataError):
    """A file is no longer what the index says. Another image can take its place, as long as few files are affected."""


@dataclass
class Tally:
    """How many reads failed since the set was loaded, in this process: shared by its threads, not by its workers.

    Each worker that reads ahead counts for itself by the same rule, so none needs to ask another one.
    """

    reads: int = 0
    failures: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def count_read(self) -> None:
        """One more read."""
        with self.lock:
            self.reads += 1

    def failure(self, what: str) -> DataError:
        """The error of a failed read: `ChangedFileError`, or the end when over 0.1 % failed, and more than once."""
        with self.lock:
            self.failures += 1
            reads, failures = self.reads, self.failures
        if failures > max(1, reads / 1000):
            return DataError(
                f"{what}; {failures} of {reads} reads failed, more than 0.1 %: stopped; restore the files, or "
                f"start a new run on the changed folder"
            )
        return ChangedFileError(what)
