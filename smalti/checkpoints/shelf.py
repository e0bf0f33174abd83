"""The folder in which the checkpoints of a run stand side by side: what is there, what goes, what the dead left."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from smalti.checkpoints.layout import ASIDE, DELETED, LATEST, MANIFEST, STEP, UNFINISHED, name_of, verify_folder
from smalti.checkpoints.patience import clear_tree, patiently
from smalti.errors import CheckpointError, RunLockedError
from smalti.storage.filesystem import FileSystem, write_file
from smalti.storage.process import Process, is_dead
from smalti.storage.sealed import unseal


class Facts(NamedTuple):
    """What the keep policy asks of a stored checkpoint."""

    run_id: str | None
    score: float | None


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay.

    Args:
        last: how many of the newest.
        every: steps divisible by this stay for good; None = only the newest.
        best: the one with the lowest score stays too; of equals the older.

    Raises:
        ValueError: last or every is below 1.
    """

    last: int = 2
    every: int | None = None
    best: bool = False

    def __post_init__(self) -> None:
        if self.last < 1 or (self.every is not None and self.every < 1):
            raise ValueError(f"keep_last {self.last} and keep_every {self.every} must be at least 1")

    def stay(self, scores: Mapping[int, float | None], newest: int) -> set[int]:
        """Those of the steps that stay.

        Args:
            scores: by step.
            newest: the one just written, which is not the largest where a run went back.
        """
        steps = sorted(scores)
        result = {newest, *steps[-self.last :]}
        if self.every is not None:
            result |= {step for step in steps if step % self.every == 0}
        told = [(score, step) for step, score in scores.items() if score is not None]
        return result | {min(told)[1]} if self.best and told else result


class Shelf:
    """The checkpoints in one folder, apart from what is in them.

    Args:
        folder: may be missing, and is then empty.
        fs: the file operations.
        sole_writer: what other machines left unfinished is of dead ones as well.
        run_id: whose checkpoints these are; those of another id are foreign. None = nothing is.
    """

    def __init__(self, folder: Path, fs: FileSystem, *, sole_writer: bool, run_id: str | None = None) -> None:
        self.folder, self.fs, self.sole_writer, self.run_id = folder, fs, sole_writer, run_id
        self._foreign: set[int] | None = None  # steps of other runs, when last looked
        self._facts: dict[int, tuple[tuple[int, int], Facts]] = {}  # by step, with what tells its manifest apart

    def names(self) -> list[str]:
        """Everything in the folder."""
        try:
            return sorted(patiently(lambda: os.listdir(self.folder), late=False))
        except FileNotFoundError:
            return []

    def steps(self) -> list[int]:
        """Steps with a stored checkpoint, smallest first; whether each is whole, `verify` tells."""
        return sorted(int(match[1]) for name in self.names() if (match := STEP.fullmatch(name)))

    def all_steps(self) -> list[int]:
        """Also those that stand aside because their writer died while replacing them."""
        asides = {int(match["step"]) for name in self.names() if (match := ASIDE.fullmatch(name))}
        return sorted(asides.union(self.steps()))

    def places(self, step: int) -> list[Path]:
        """Where the checkpoint of a step may be."""
        asides = [name for name in self.names() if (m := ASIDE.fullmatch(name)) and int(m["step"]) == step]
        return [path for path in (self.folder / name for name in (name_of(step), *asides)) if path.exists()]

    def facts(self, step: int) -> Facts:
        """From the manifest, as far as it can be read; whether the checkpoint is whole, `verify_folder` tells."""
        path = self.folder / name_of(step) / MANIFEST
        try:
            stat = path.stat()
            mark = (stat.st_mtime_ns, stat.st_ino)
            known = self._facts.get(step)
            if known is None or known[0] != mark:
                manifest = unseal(patiently(path.read_bytes, late=False), str(path))
                known = self._facts[step] = (mark, Facts(manifest.get("run_id"), manifest.get("score")))
        except (CheckpointError, OSError):
            return Facts(None, None)
        return known[1]

    def is_foreign(self, step: int) -> bool:
        """Whether another run wrote this one."""
        return self.run_id is not None and self.facts(step).run_id not in (None, self.run_id)

    def look(self) -> set[int]:
        """Take note of what other runs have here: it is what the run began with."""
        self._foreign = {step for step in self.steps() if self.is_foreign(step)}
        return self._foreign

    def refuse_another_run(self, step: int) -> None:
        """Stop before `step` is written where another run is ahead, or has written since the last look.

        Raises:
            RunLockedError: it does.
        """
        known = self._foreign
        foreign = self.look()
        bad = [other for other in sorted(foreign) if other >= step or (known is not None and other not in known)]
        if bad:
            self._foreign = known
            raise RunLockedError(
                f"{self.folder} has checkpoint {name_of(bad[-1])} of run {self.facts(bad[-1]).run_id}, and this is run "
                f"{self.run_id} at step {step}: another run writes there too. Nothing is replaced or deleted; stop one "
                "of the two, or choose another folder"
            )

    def replaced(self) -> list[Path]:
        """Checkpoints that this process moved aside, and whose successor stands."""
        return [self.folder / name for name in self.names() if (m := ASIDE.fullmatch(name)) and self._done(m)]

    def discard(self, folders: Iterable[Path]) -> None:
        """Take away their names at once, then their files."""
        graves = []
        for folder in folders:
            grave = self.folder / f".tmp-del-{folder.name.lstrip('.')}-{secrets.token_hex(4)}"
            with contextlib.suppress(FileNotFoundError):  # gone already, though a network folder still shows it
                self.fs.rename(folder, grave)
                graves.append(grave)
        if graves:
            # Else a power cut could bring back the name of a checkpoint without its files.
            self.fs.sync_folder(self.folder)
        for grave in graves:
            clear_tree(self.fs, grave)

    def write_hint(self, step: int) -> None:
        """LATEST is for people and scripts; no reader here trusts it."""
        temporary = self.folder / f".tmp-del-{LATEST}-{secrets.token_hex(4)}"  # so that any sweep may take it
        write_file(self.fs, temporary, [f"{name_of(step)}\n".encode()])
        self.fs.rename(temporary, self.folder / LATEST)
        self.fs.sync_folder(self.folder)

    def sweep(self) -> None:
        """Clear away what dead writers left."""
        for name in self.names():
            path = self.folder / name
            if DELETED.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):  # another process may sweep as well
                    clear_tree(self.fs, path) if path.is_dir() else self.fs.remove_file(path)
            elif (match := UNFINISHED.fullmatch(name)) and self._is_dead(match["writer"]):
                clear_tree(self.fs, path)
            elif (match := ASIDE.fullmatch(name)) and self._is_dead(match["writer"]):
                self._settle(path, self.folder / name_of(int(match["step"])))

    def _settle(self, aside: Path, final: Path) -> None:
        """A writer died between moving a checkpoint aside and tidying up: keep whichever of the two is whole."""
        if final.exists():
            try:
                verify_folder(final)
            except (CheckpointError, OSError):
                self.discard([final])
            else:
                self.discard([aside])
                return
        self.fs.rename(aside, final)
        self.fs.sync_folder(self.folder)

    def _is_dead(self, writer: str) -> bool:
        dead = is_dead(writer)
        return self.sole_writer if dead is None else dead

    def _done(self, aside: re.Match[str]) -> bool:
        """Whether a replaced checkpoint's successor stands, and was put there by this process."""
        return aside["writer"] == Process.current().token and (self.folder / name_of(int(aside["step"]))).exists()
