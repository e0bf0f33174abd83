"""Checkpoints of a training run: written so that a kill, a power cut or a full disk never costs a stored one.

A checkpoint is a folder `step-0000000100` with one safetensors file per group of tensors and process that wrote it,
`index.json` (which rows of which tensor are in which file), `state.json`, and `manifest.json`, which names every file
with its size and hash. It is written under another name, synced, and renamed when whole; hence a reader takes the
newest folder whose manifest fits, and needs to trust nothing else.

Of many processes each writes and hashes its own files; the first alone makes, renames and deletes folders. Every step
of that is taken together (see `Together`), so a failure of one of them is known to all before anything is renamed.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from smalti.checkpoints.patience import PatientFileSystem, patiently
from smalti.checkpoints.shards import (
    Groups,
    Index,
    Piece,
    StoredCheckpoint,
    index_of,
    index_of_files,
    merge,
    own_parts,
    parse_index,
    row_count,
    untiled,
)
from smalti.checkpoints.together import Together
from smalti.errors import CheckpointError, RunLockedError, StorageError
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
from smalti.storage.tensors import file_pieces, file_size, refuse_non_finite
from smalti.world import World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMAT, VERSION = "smalti-checkpoint", 2  # 1 had whole tensors only, no index, and no run_id

MANIFEST = "manifest.json"
_STATE, _INDEX, _LATEST = "state.json", "index.json", "LATEST"
_GROUP = re.compile(r"[a-z][a-z0-9_]*")
_FILE = re.compile(r"state\.json|index\.json|(?P<group>[a-z][a-z0-9_]*)(\.rank-\d{4,6})?\.safetensors")
_STEP = re.compile(r"step-(\d{10})")
# What a writer leaves when it dies: a checkpoint half written, one half deleted, one that made room for its successor.
_UNFINISHED = re.compile(r"\.tmp-\d{10}-(?P<writer>[0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}")
_DELETED = re.compile(r"\.tmp-del-.*")
_ASIDE = re.compile(r"\.old-(?P<step>\d{10})-(?P<writer>[0-9a-f]{8}-[0-9a-f]{8}-\d+-\d+)-[0-9a-f]{8}")
_OVERHEAD = 4096  # bytes of manifest and index beside the tensors; the index grows with their number
_PER_TENSOR = 200


class _Facts(NamedTuple):
    """What the keep policy asks of a stored checkpoint."""

    run_id: str | None
    score: float | None


@dataclass(frozen=True)
class _Saving:
    """One save, as this process sees it."""

    step: int
    parts: dict[str, dict[str, Piece]]
    files: dict[str, str]  # of each group with rows here
    state: bytes
    score: float | None
    needed: int  # bytes that this process writes

    def room_errors(self, store: "CheckpointStore", needed: int) -> contextlib.AbstractContextManager[None]:
        advice = "Checkpoints stored before are untouched; make room and run again"
        return storage_errors(store.fs, store.folder, needed, f"storing checkpoint {_name(self.step)}", advice)

    def tidy_errors(self, store: "CheckpointStore", needed: int) -> contextlib.AbstractContextManager[None]:
        advice = f"Checkpoint {_name(self.step)} itself is stored; what failed is the tidying after it"
        return storage_errors(store.fs, store.folder, needed, f"tidying up after {_name(self.step)}", advice)


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
    ) -> None:
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep_last {keep_last} and keep_every {keep_every} must be at least 1")
        self.folder = Path(folder)
        self.keep_last, self.keep_every, self.keep_best = keep_last, keep_every, keep_best
        self.sole_writer = sole_writer
        self.world = World() if world is None else world
        self.run_id = run_id
        self.fs: FileSystem = PatientFileSystem(LocalFileSystem() if fs is None else fs, shared=self.world.size > 1)
        self._turn = threading.Lock()  # a second save waits for the first
        self._facts: dict[str, tuple[tuple[int, int], _Facts]] = {}  # by folder and state of its manifest
        self._foreign: set[int] | None = None  # steps of other runs, when last looked

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
            StorageError: the disk is full or refuses; the checkpoints stored before are untouched.
            RunLockedError: another run writes into the folder.
            SmaltiError: another process ended meanwhile.
            ValueError, TypeError: a step, group name, dtype, set of pieces or state that cannot be stored.
        """
        together = Together(self.world, group)
        with self._turn:
            saving: _Saving | None = None
            index: Index = {}
            needed = 0

            def prepare() -> dict[str, Any]:
                nonlocal saving
                saving = self._prepare(step, groups, state, score)
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
            final = self.folder / _name(step)
            try:
                verifies = together.step(
                    lambda: self._write_own(now, temporary),
                    lambda answers: self._commit(now, temporary, index, answers, needed),
                )
            except BaseException:
                if self.world.rank == 0:
                    with contextlib.suppress(OSError):  # the next sweep clears what stays
                        remove_tree(self.fs, temporary)
                raise
            together.step(
                lambda: self._verify_new(now, final, needed) if verifies else None,
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
        """
        together = Together(self.world, group)
        for step, name in together.step(lambda: None, lambda answers: self._candidates()):
            try:
                return self._read(together, self.folder / name, step)
            except NewerFormatError:
                raise
            except (CheckpointError, OSError) as error:
                if self.world.rank == 0:
                    on_skip(f"checkpoint {name} is skipped: {error}")
        return None

    def load(self, step: int, *, group: "ProcessGroup | None" = None) -> StoredCheckpoint:
        """The checkpoint of one step.

        Raises:
            CheckpointError: it does not exist or is damaged.
        """
        together = Together(self.world, group)
        places = together.step(lambda: None, lambda answers: [path.name for path in self._places(step)])
        have = ", ".join(map(str, self._all_steps())) or "none"
        if not places:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has: {have}")
        problems = []
        for name in places:
            try:
                return self._read(together, self.folder / name, step)
            except NewerFormatError:
                raise
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
        raise CheckpointError(f"{problems[0]}; choose another step: {have}")

    def steps(self) -> list[int]:
        """Steps with a stored checkpoint, smallest first; whether each is whole, `verify` tells."""
        return sorted(int(match[1]) for name in self._names() if (match := _STEP.fullmatch(name)))

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
            self._sweep()

    def _prepare(self, step: int, groups: Groups, state: Mapping[str, Any], score: float | None) -> _Saving:
        if not 0 <= step < 10**10:
            raise ValueError(f"step {step} is outside 0 .. 9,999,999,999")
        if bad := [group for group in groups if not _GROUP.fullmatch(group)]:
            raise ValueError(f"group name {bad[0]!r}: use small letters, digits and underscores")
        parts = own_parts(groups, self.world.rank)
        needed, files = 0, {}
        for group, pieces in parts.items():
            rows = {name: piece.rows for name, piece in pieces.items()}
            refuse_non_finite(rows, f"checkpoint {_name(step)}, group {group!r}")
            if any(row_count(tensor.shape) for tensor in rows.values()):
                suffix = f".rank-{self.world.rank:04d}" if self.world.size > 1 else ""
                files[group] = f"{group}{suffix}.safetensors"
            needed += file_size(rows) + _PER_TENSOR * len(rows)
        text = (json.dumps(dict(state), indent=1) + "\n").encode() if self.world.rank == 0 else b""
        finite = None if score is None or not math.isfinite(score) else float(score)
        return _Saving(step, parts, files, text, finite, needed + len(text) + _OVERHEAD)

    def _admit(self, saving: _Saving, needed: int) -> str:
        """Make the folder that all write into, once nothing is against it; its name."""
        with saving.room_errors(self, needed):
            make_folders(self.fs, self.folder)
            self._sweep()
            self._refuse_another_run(saving.step)
            require_space(self.fs, self.folder, needed, f"checkpoint {_name(saving.step)}")
            temporary = self.folder / f".tmp-{saving.step:010d}-{_nonce()}"
            self.fs.make_folder(temporary)
        return temporary.name

    def _write_own(self, saving: _Saving, temporary: Path) -> dict[str, Any]:
        records = {}
        with saving.room_errors(self, saving.needed):
            for group, name in saving.files.items():
                rows = {tensor: piece.rows for tensor, piece in saving.parts[group].items()}
                records[name] = write_file(self.fs, temporary / name, file_pieces(rows))._asdict()
        return records

    def _commit(
        self, saving: _Saving, temporary: Path, index: Index, answers: list[Mapping[str, Any]], needed: int
    ) -> bool:
        """Everything is written: make it the checkpoint of its step.

        Returns:
            Whether something is to be deleted, for which the new one must be seen to be whole.
        """
        fs, final = self.fs, self.folder / _name(saving.step)
        aside = self.folder / temporary.name.replace(".tmp-", ".old-", 1)
        with saving.room_errors(self, needed):
            try:
                files = {name: record for answer in answers for name, record in answer.items()}
                own = {_INDEX: _compact(index), _STATE: saving.state}
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
                write_file(fs, temporary / MANIFEST, [seal(manifest)])
                fs.sync_folder(temporary)
                if final.exists():
                    fs.rename(final, aside)
                fs.rename(temporary, final)
                fs.sync_folder(self.folder)
            except BaseException:
                # Best effort: what stays is settled by the next sweep, and readers know the name `.old-` too.
                with contextlib.suppress(OSError):
                    if aside.exists() and not final.exists():
                        fs.rename(aside, final)
                raise
        with saving.tidy_errors(self, needed):
            return bool(self._victims(saving.step))

    def _verify_new(self, saving: _Saving, final: Path, needed: int) -> None:
        with saving.tidy_errors(self, needed):
            try:
                verify_folder(final, share=self.world, late=True)
            except (CheckpointError, FileNotFoundError) as error:
                raise StorageError(
                    f"{error}. It was just written, so the disk does not keep what it is given; no older checkpoint "
                    "is deleted. Check the disk or choose another one"
                ) from error

    def _tidy(self, saving: _Saving, needed: int) -> None:
        with saving.tidy_errors(self, needed):
            self._discard(self._victims(saving.step))
            self._write_hint(saving.step)

    def _victims(self, newest: int) -> list[Path]:
        """What the keep policy lets go."""
        steps = [step for step in self.steps() if not self._is_foreign(step)]
        kept = {newest, *steps[-self.keep_last :]}
        if self.keep_every is not None:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.keep_best:
            scores = {step: score for step in steps if (score := self._facts_of(step).score) is not None}
            kept |= {min(scores, key=lambda step: (scores[step], step))} if scores else set()
        victims = [self.folder / _name(step) for step in steps if step not in kept]
        asides = [self.folder / name for name in self._names() if (m := _ASIDE.fullmatch(name)) and self._done(m)]
        return victims + asides

    def _refuse_another_run(self, step: int) -> None:
        foreign = {other for other in self.steps() if self._is_foreign(other)}
        known, self._foreign = self._foreign, foreign
        bad = [other for other in sorted(foreign) if other >= step or (known is not None and other not in known)]
        if bad:
            self._foreign = known
            raise RunLockedError(
                f"{self.folder} has checkpoint {_name(bad[-1])} of run {self._facts_of(bad[-1]).run_id}, and this is "
                f"run {self.run_id} at step {step}: another run writes there too. Nothing is replaced or deleted; stop "
                "one of the two, or choose another folder"
            )

    def _is_foreign(self, step: int) -> bool:
        return self.run_id is not None and self._facts_of(step).run_id not in (None, self.run_id)

    def _facts_of(self, step: int) -> _Facts:
        """From the manifest, if it can be read: whether all of it is whole is asked elsewhere."""
        path = self.folder / _name(step) / MANIFEST
        try:
            stat = path.stat()
            known = self._facts.get(path.parent.name)
            if known is None or known[0] != (stat.st_mtime_ns, stat.st_ino):
                manifest = unseal(path.read_bytes(), str(path))
                facts = _Facts(manifest.get("run_id"), manifest.get("score"))
                known = self._facts[path.parent.name] = ((stat.st_mtime_ns, stat.st_ino), facts)
        except (CheckpointError, OSError):
            return _Facts(None, None)
        return known[1]

    def _done(self, aside: re.Match[str]) -> bool:
        """Whether a replaced checkpoint's successor stands, and was put there by this process."""
        return aside["writer"] == Process.current().token and (self.folder / _name(int(aside["step"]))).exists()

    def _discard(self, folders: list[Path]) -> None:
        graves = []
        for folder in folders:
            grave = self.folder / f".tmp-del-{folder.name.lstrip('.')}-{secrets.token_hex(4)}"
            self.fs.rename(folder, grave)
            graves.append(grave)
        if graves:
            # Else a power cut could bring back the name of a checkpoint without its files.
            self.fs.sync_folder(self.folder)
        for grave in graves:
            remove_tree(self.fs, grave)

    def _write_hint(self, step: int) -> None:
        """LATEST is for people and scripts; no reader here trusts it."""
        temporary = self.folder / f".tmp-del-{_LATEST}-{secrets.token_hex(4)}"  # so that any sweep may take it
        write_file(self.fs, temporary, [f"{_name(step)}\n".encode()])
        self.fs.rename(temporary, self.folder / _LATEST)
        self.fs.sync_folder(self.folder)

    def _sweep(self) -> None:
        for name in self._names():
            path = self.folder / name
            if _DELETED.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):  # another process may sweep as well
                    remove_tree(self.fs, path) if path.is_dir() else self.fs.remove_file(path)
            elif (match := _UNFINISHED.fullmatch(name)) and self._is_dead(match["writer"]):
                remove_tree(self.fs, path)
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
        self.fs.rename(aside, final)
        self.fs.sync_folder(self.folder)

    def _is_dead(self, writer: str) -> bool:
        dead = is_dead(writer)
        return self.sole_writer if dead is None else dead

    def _names(self) -> list[str]:
        try:
            return sorted(patiently(lambda: os.listdir(self.folder), late=False))
        except FileNotFoundError:
            return []

    def _all_steps(self) -> list[int]:
        """Also those that stand aside because their writer died while replacing them."""
        asides = {int(match["step"]) for name in self._names() if (match := _ASIDE.fullmatch(name))}
        return sorted(asides.union(self.steps()))

    def _places(self, step: int) -> list[Path]:
        asides = [name for name in self._names() if (m := _ASIDE.fullmatch(name)) and int(m["step"]) == step]
        return [path for path in (self.folder / name for name in (_name(step), *asides)) if path.exists()]

    def _candidates(self) -> list[tuple[int, str]]:
        """Where to look for the newest, in order; and what other runs have here is known from now on."""
        self._foreign = {step for step in self.steps() if self._is_foreign(step)}
        return [(step, path.name) for step in reversed(self._all_steps()) for path in self._places(step)]

    def _read(self, together: Together, path: Path, step: int) -> StoredCheckpoint:
        found: StoredCheckpoint | None = None
        late = self.world.rank > 0  # the first process has seen it

        def check() -> str:
            nonlocal found
            manifest = verify_folder(path, share=self.world, late=late)
            if manifest["step"] != step:
                raise CheckpointError(f"{path} is the checkpoint of step {manifest['step']} under another name")
            found = _open(path, manifest, late=self.world.size > 1)
            return str(manifest["digest"])

        def compare(digests: list[str]) -> None:
            if len(set(digests)) > 1:
                raise CheckpointError(f"{path} is not the same for all processes: does each see the same folder?")

        together.step(check, compare)
        assert found is not None  # check has run: the step succeeded
        return found


def verify_folder(path: Path, *, share: World | None = None, late: bool = False) -> dict[str, Any]:
    """The manifest of a checkpoint folder whose files are as it says.

    Args:
        share: of several processes each reads a part of the large files.
        late: another machine has just seen it, so that what is missing here is only late.

    Raises:
        CheckpointError: something is missing or changed.
        NewerFormatError: a newer smalti wrote it.
        OSError: it cannot be read.
    """
    where = path / MANIFEST
    if not late and not where.exists():
        raise CheckpointError(f"{path} has no {MANIFEST}: it is not a whole checkpoint")
    data = patiently(where.read_bytes, late=late)
    manifest = unseal(data, str(where))
    check_format(manifest, FORMAT, VERSION, str(where))
    files = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    for name in files:
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{where} names the file {name!r}, which no checkpoint has")
    for name in _shared_out(files, World() if share is None else share):
        _check_file(path / name, files[name], late=late)
    return manifest | {"digest": hashlib.sha256(data).hexdigest()}


def _shared_out(files: Mapping[str, FileRecord], world: World) -> list[str]:
    """This process's files: the largest first, each to whom has least; the small ones, which all need, to all."""
    loads = [0] * world.size
    mine = [name for name in files if name in (_STATE, _INDEX)]
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        if name not in mine:
            rank = loads.index(min(loads))
            loads[rank] += files[name].bytes
            if rank == world.rank:
                mine.append(name)
    return mine


def _open(path: Path, manifest: Mapping[str, Any], *, late: bool) -> StoredCheckpoint:
    """A checkpoint whose files are known to be as they were written."""
    groups = {m["group"]: path / name for name in manifest["files"] if (m := _FILE.fullmatch(name)) and m["group"]}
    try:
        if manifest["version"] == 1:
            index = index_of_files(groups)
        else:
            index = parse_index(json.loads(patiently((path / _INDEX).read_bytes, late=late)))
        state = json.loads(patiently((path / _STATE).read_bytes, late=late))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {_INDEX} or {_STATE} is not what its manifest promises: {error}") from error
    for group, entries in index.items():
        for name, entry in entries.items():
            if gap := untiled(entry) or next(
                (f"{s.file} is no file of it" for s in entry.slices if s.file not in manifest["files"]), ""
            ):
                raise CheckpointError(f"{path / _INDEX}: {group}.{name} is not whole: {gap}")
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


def _compact(index: Index) -> bytes:
    return (json.dumps(index, separators=(",", ":")) + "\n").encode()


def _name(step: int) -> str:
    return f"step-{step:010d}"


def _nonce() -> str:
    return f"{Process.current().token}-{secrets.token_hex(4)}"
