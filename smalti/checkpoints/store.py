"""Checkpoints of a training run: written so that a kill, a power cut or a full disk never costs a stored one.

A checkpoint is a folder `step-0000000100` with one safetensors file per group of tensors and process that wrote it,
`index.json` (which rows of which tensor are in which file), `state.json`, and `manifest.json`, which names every file
with its size and hash. It is written under another name, synced, and renamed when whole; hence a reader takes the
newest folder whose manifest fits, and needs to trust nothing else.

Of many processes each writes and hashes its own files; the first alone makes, renames and deletes folders. Every step
of that is taken together (see `Together`), so a failure of one of them is known to all before anything is renamed.
"""

import contextlib
import errno
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smalti.checkpoints.layout import (
    FORMAT,
    INDEX,
    MANIFEST,
    STATE,
    VERSION,
    name_of,
    nonce,
    open_folder,
    verify_folder,
)
from smalti.checkpoints.mirror import Mirror
from smalti.checkpoints.patience import PatientFileSystem, clear_tree
from smalti.checkpoints.saving import Saving
from smalti.checkpoints.shards import Groups, Index, StoredCheckpoint, index_of, merge
from smalti.checkpoints.shelf import Keep, Shelf
from smalti.checkpoints.together import Together
from smalti.errors import CheckpointError, StorageError
from smalti.storage.filesystem import (
    FileSystem,
    LocalFileSystem,
    make_folders,
    require_space,
    storage_errors,
    write_file,
)
from smalti.storage.sealed import NewerFormatError, seal, smalti_version
from smalti.world import World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: made when the first checkpoint is saved; with several processes, one that all of them see.
        keep_last: how many of the newest steps stay.
        keep_every: steps divisible by this stay for good; None = only the newest.
        keep_best: the one with the lowest score stays too.
        fs: the file operations; tests put failures here.
        sole_writer: the caller holds the `RunLock` of the run, so what other machines left behind is dead as well.
        world: the processes that save and load together; each makes a store, and calls `save`, `load` and
            `load_newest` when the others do.
        run_id: names the run in what it writes. Checkpoints of another run are never deleted or replaced: `save`
            refuses when one of them is newer, or came while this run was writing.
        mirror: a second place, written after each save by the first process, and asked for newer ones by
            `load_newest`.

    Raises:
        ValueError: keep_last or keep_every is below 1.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_best: bool = False,
        fs: FileSystem | None = None,
        sole_writer: bool = False,
        world: World | None = None,
        run_id: str | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.keep = Keep(keep_last, keep_every, keep_best)
        self.world = World() if world is None else world
        self.run_id, self.mirror = run_id, mirror
        self.fs: FileSystem = PatientFileSystem(LocalFileSystem() if fs is None else fs, shared=self.world.size > 1)
        self.fetched = ""  # where the checkpoint came from that `load_newest` gave, if from the mirror
        self._turn = threading.Lock()  # a second save waits for the first
        self._shelf = Shelf(self.folder, self.fs, sole_writer=sole_writer, run_id=run_id)

    def name_run(self, run_id: str | None) -> None:
        """Whose checkpoints are written from now on; see `run_id`. What others have here by now was here before."""
        self.run_id = self._shelf.run_id = run_id
        self._shelf.look()

    def save(
        self,
        step: int,
        groups: Groups,
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        group: "ProcessGroup | None" = None,
    ) -> Path:
        """Store one checkpoint; when this returns, it survives a power cut. Then old ones are deleted.

        With several processes all call it, and all raise if one of them fails.

        Args:
            step: 0 to 9,999,999,999. A checkpoint of the same step is replaced.
            groups: by name (`model`, `ema`, `optimizer`), each a dict of tensors on any device. A `Piece` is written
                by the process that gives it; a plain tensor by the first process, and is not looked at on the others.
            state: what else a resume needs, in the types that JSON has; the first process's counts.
            score: for `keep_best`; lower is better, and one that is not finite is never the best.
            group: a gloo process group to talk over; None = the default one.

        Raises:
            NumericError: a tensor is not finite, on any process; nothing is written or deleted.
            StorageError: the disk is full or refuses; the checkpoints stored before are untouched. Or the mirror cannot
                be reached; then this one is stored here.
            RunLockedError: another run writes into the folder.
            SmaltiError: another process ended meanwhile.
            ValueError, TypeError: a step, group name, dtype, set of pieces or state that cannot be stored.
        """
        together = Together(self.world, group)
        with self._turn:
            saving: Saving | None = None
            index: Index = {}
            needed = 0

            def prepare() -> dict[str, Any]:
                nonlocal saving
                saving = Saving.of(step, groups, state, score, self.world, self.fs, self.folder)
                return {"step": step, "needed": saving.needed, "index": index_of(saving.parts, saving.files)}

            def admit(answers: list[Any]) -> str:
                nonlocal index, needed
                assert saving is not None
                if other := [answer["step"] for answer in answers if answer["step"] != step]:
                    raise ValueError(f"the processes save different steps: {step} and {other[0]}")
                index = merge([answer["index"] for answer in answers])
                needed = sum(answer["needed"] for answer in answers)
                return self._admit(saving, needed)

            temporary = self.folder / together.step(prepare, admit)
            assert saving is not None  # prepare has run: the step succeeded
            now = saving
            final = self.folder / name_of(step)
            try:
                digest = together.step(
                    lambda: now.write_own(temporary),
                    lambda answers: self._commit(now, temporary, index, answers, needed),
                )
            except BaseException:
                if self.world.rank == 0:
                    with contextlib.suppress(OSError):  # the next sweep clears what stays
                        clear_tree(self.fs, temporary)
                raise
            together.step(
                lambda: self._verify_new(now, final, digest, needed) if digest else None,
                lambda answers: self._tidy(now, needed),
            )
        return final

    def load_newest(
        self, on_skip: Callable[[str], None], *, group: "ProcessGroup | None" = None
    ) -> StoredCheckpoint | None:
        """The newest checkpoint that is whole, or None if there is none; the same on all processes.

        Args:
            on_skip: told, in one line with name and reason, of each newer one that is not; on the first process.
            group: as in `save`.

        Raises:
            CheckpointError: the newest whole one was written by a newer smalti. Falling back to an older one would
                soon delete it.
            StorageError: the mirror cannot be reached, so nobody knows whether it has a newer one.
            RunLockedError: the mirror has a newer one, of another run than the newest here.
        """
        together = Together(self.world, group)

        def skip(name: str, error: CheckpointError) -> None:
            if self.world.rank == 0:
                on_skip(f"checkpoint {name} is skipped: {error}")

        found = self._first_whole(together, together.step(lambda: None, lambda answers: self._candidates()), skip)
        if self.mirror is None:
            return found

        def fetch(answers: list[Any]) -> list[Any]:
            assert self.mirror is not None
            newest = -1 if found is None else found.step
            own = None if found is None else found.run_id
            path = self.mirror.fetch_newest(self.folder, newer_than=newest, run_id=own, on_skip=on_skip, fs=self.fs)
            return [] if path is None else [int(path.name.removeprefix("step-")), path.name]

        fetched = together.step(lambda: None, fetch)
        self.fetched = self.mirror.url if fetched else ""  # asked anew after a rewind
        return self._read(together, self.folder / fetched[1], fetched[0]) if fetched else found

    def load(self, step: int, *, group: "ProcessGroup | None" = None) -> StoredCheckpoint:
        """The checkpoint of one step.

        Raises:
            CheckpointError: it does not exist or is damaged.
        """
        together = Together(self.world, group)
        places = together.step(lambda: None, lambda answers: [(step, path.name) for path in self._shelf.places(step)])
        problems: list[str] = []
        if found := self._first_whole(together, places, lambda name, error: problems.append(str(error))):
            return found
        have = ", ".join(map(str, self._shelf.all_steps())) or "none"
        if not places:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has: {have}")
        raise CheckpointError(f"{problems[0]}; choose another step: {have}")

    def steps(self) -> list[int]:
        """Steps with a stored checkpoint, smallest first; whether each is whole, `verify` tells."""
        return self._shelf.steps()

    def verify(self, path: Path) -> None:
        """Read every byte of a checkpoint folder and compare with its manifest; by this process alone.

        Raises:
            CheckpointError: something is missing or changed.
        """
        try:
            verify_folder(Path(path))
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error

    def sweep(self) -> None:
        """Clear away what dead writers left; every `save` begins with it.

        Raises:
            StorageError: the disk refuses.
        """
        with (
            self._turn,
            storage_errors(self.fs, self.folder, 0, "clearing leftovers", "Check the permissions of the folder"),
        ):
            self._shelf.sweep()

    def _first_whole(
        self,
        together: Together,
        places: list[tuple[int, str]],
        on_skip: Callable[[str, CheckpointError], None],
    ) -> StoredCheckpoint | None:
        for step, name in places:
            try:
                return self._read(together, self.folder / name, step)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                on_skip(name, error)
        return None

    def _admit(self, saving: Saving, needed: int) -> str:
        """Make the folder that all write into, once nothing is against it; its name."""
        with saving.room_errors(needed):
            make_folders(self.fs, self.folder)
            self._shelf.sweep()
            self._shelf.refuse_another_run(saving.step)
            require_space(self.fs, self.folder, needed, f"checkpoint {name_of(saving.step)}")
            temporary = self.folder / f".tmp-{saving.step:010d}-{nonce()}"
            self.fs.make_folder(temporary)
        return temporary.name

    def _commit(
        self, saving: Saving, temporary: Path, index: Index, answers: list[Mapping[str, Any]], needed: int
    ) -> str:
        """Everything is written: make it the checkpoint of its step.

        Returns:
            The manifest's sha256 if something is to be deleted, for which the new one must be seen to be whole.
        """
        fs, final = self.fs, self.folder / name_of(saving.step)
        aside = self.folder / temporary.name.replace(".tmp-", ".old-", 1)
        with saving.room_errors(needed):
            try:
                files = {name: record for answer in answers for name, record in answer.items()}
                own = {INDEX: _compact(index), STATE: saving.state}
                files |= {name: write_file(fs, temporary / name, [data])._asdict() for name, data in own.items()}
                manifest = {
                    "format": FORMAT,
                    "version": VERSION,
                    "smalti": smalti_version(),
                    "step": saving.step,
                    "run_id": self.run_id,
                    "score": saving.score,
                    "processes": self.world.size,
                    "files": dict(sorted(files.items())),
                }
                written = write_file(fs, temporary / MANIFEST, [seal(manifest)])
                fs.sync_folder(temporary)
                if final.exists():
                    fs.rename(final, aside)
                try:
                    fs.rename(temporary, final)
                except OSError as error:
                    # On a network, a folder of that name may not show yet. One that did show is aside by now.
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or aside.exists():
                        raise
                    fs.rename(final, aside)
                    fs.rename(temporary, final)
                fs.sync_folder(self.folder)
            except BaseException:
                # Best effort: what stays is settled by the next sweep, and readers know the name `.old-` too.
                with contextlib.suppress(OSError):
                    if aside.exists() and not final.exists():
                        fs.rename(aside, final)
                raise
        with saving.tidy_errors(needed):
            return written.sha256 if self._victims(saving.step) else ""

    def _verify_new(self, saving: Saving, final: Path, digest: str, needed: int) -> None:
        with saving.tidy_errors(needed):
            try:
                verify_folder(final, share=self.world, late=True, digest=digest)
            except (CheckpointError, FileNotFoundError) as error:
                raise StorageError(
                    f"{error}. It was just written, so the disk does not keep what it is given; no older checkpoint "
                    "is deleted. Check the disk or choose another one"
                ) from error

    def _tidy(self, saving: Saving, needed: int) -> None:
        with saving.tidy_errors(needed):
            self._shelf.discard(self._victims(saving.step))
            self._shelf.write_hint(saving.step)
        if self.mirror is not None:
            self.mirror.upload(self.folder / name_of(saving.step))

    def _victims(self, newest: int) -> list[Path]:
        scores = {
            step: self._shelf.facts(step).score for step in self._shelf.steps() if not self._shelf.is_foreign(step)
        }
        gone = sorted(scores.keys() - self.keep.stay(scores, newest))
        return [self.folder / name_of(step) for step in gone] + self._shelf.replaced()

    def _candidates(self) -> list[tuple[int, str]]:
        """Where to look for the newest, in order; and what other runs have here is known from now on."""
        self._shelf.look()
        return [(step, path.name) for step in reversed(self._shelf.all_steps()) for path in self._shelf.places(step)]

    def _read(self, together: Together, path: Path, step: int) -> StoredCheckpoint:
        found: StoredCheckpoint | None = None
        late = self.world.rank > 0  # the first process has seen it

        def check() -> str:
            nonlocal found
            try:
                manifest = verify_folder(path, share=self.world, late=late)
                if manifest["step"] != step:
                    raise CheckpointError(f"{path} is the checkpoint of step {manifest['step']} under another name")
                found = open_folder(path, manifest, late=self.world.size > 1)
            except OSError as error:
                raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
            return str(manifest["digest"])

        def compare(digests: list[str]) -> None:
            if len(set(digests)) > 1:
                raise CheckpointError(f"{path} is not the same for all processes: does each see the same folder?")

        together.step(check, compare)
        assert found is not None  # check has run: the step succeeded
        return found


def _compact(index: Index) -> bytes:
    return (json.dumps(index, separators=(",", ":")) + "\n").encode()
