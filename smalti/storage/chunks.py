"""Work cut into numbered chunks, which any number of processes share without talking to each other.

Each chunk is one file. A process claims a chunk before it makes it, writes it under another name, syncs and renames it;
so a chunk is there whole or not at all, nobody waits for the dead, and a restart with more or fewer processes goes on
with whatever is missing. A claim is a lock of the kernel's, which ends with its process, however that ends. Where such
locks are not heard (some network disks), two processes may make the same chunk: work is wasted, and as both write the
same bytes, nothing else happens.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from smalti.errors import CheckpointError
from smalti.storage.filesystem import FileSystem, LocalFileSystem, make_folders, remove_tree, storage_errors, write_file
from smalti.storage.tensors import file_pieces, file_size, read_tensors

_CHUNK = re.compile(r"chunk-(\d{8})\.safetensors")
_UNHEARD = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # a disk without file locks
_SHORTEST, _LONGEST = 0.02, 1.0  # seconds between two looks while others work


class DamagedChunkError(CheckpointError):
    """A chunk is missing or is not as it was written; `index` says which."""

    def __init__(self, message: str, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


class Claim:
    """Held in a `with` block, or until `release`, or until the process ends."""

    def __init__(self, path: Path, descriptor: int, claims: "Claims") -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._claims = claims  # through which a forked child finds what to forget

    def release(self, *, remove: bool = False) -> None:
        """Let go. `remove` takes the file away as well, when nobody will want this claim again."""
        if self._descriptor is not None:
            if remove:
                with contextlib.suppress(FileNotFoundError):  # the folder may have been cleared
                    self.path.unlink()
            with contextlib.suppress(OSError):  # where locks are not heard; closing says the same
                # Not by closing alone: a child that was forked a moment ago may not have let go of its copy yet.
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.forget()

    def forget(self) -> None:
        """Close without a word: what a forked child does with its parent's claims."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Claims:
    """Named claims, each a file in one folder, at most one holder each.

    Args:
        folder: must exist when a claim is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._held: weakref.WeakSet[Claim] = weakref.WeakSet()
        # A forked child inherits the locks, and would hold them on after its parent was killed.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(reference))

    def take(self, name: str) -> Claim | None:
        """The claim, or None while another process (or another place in this one) holds it.

        Raises:
            FileNotFoundError: the folder is gone.
            OSError: the folder cannot be written to.
        """
        path = self.folder / f".claim-{name}"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if not _locked(descriptor):
                    os.close(descriptor)
                    return None
                current = _is_file(descriptor, path)
            except BaseException:
                os.close(descriptor)
                raise
            if current:
                claim = Claim(path, descriptor, self)
                self._held.add(claim)
                return claim
            os.close(descriptor)  # its holder removed it meanwhile; others may hold the file that has the name now

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Wait for a claim that others hold for moments only, hold it for a `with` block, and take its file away."""
        while (claim := self.take(name)) is None:
            time.sleep(_SHORTEST)
        try:
            yield
        finally:
            claim.release(remove=True)

    def any_held(self) -> bool:
        """Whether a living process holds one of them."""
        with contextlib.suppress(FileNotFoundError):
            for path in list(self.folder.glob(".claim-*")):
                claim = self.take(path.name.removeprefix(".claim-"))
                if claim is None:
                    return True
                claim.release(remove=True)
        return False


class ChunkStore:
    """The chunks of one piece of work, in one folder.

    Args:
        folder: of these chunks alone; `open` makes it.
        count: chunks in all, numbered from 0.
        identity: a digest of everything that decides their bytes; a chunk of another identity counts as damaged.
        fs: the file operations; tests put failures here.

    Raises:
        ValueError: count is below 1.
    """

    def __init__(self, folder: Path, count: int, identity: str, *, fs: FileSystem | None = None) -> None:
        if count < 1:
            raise ValueError(f"there must be at least one chunk, got {count}")
        self.folder, self.count, self.identity = Path(folder), count, identity
        self._fs: FileSystem = LocalFileSystem() if fs is None else fs
        self._claims = Claims(self.folder)

    def open(self) -> None:
        """Make the folder. Apart from claiming, which must not bring back a folder that somebody has cleared.

        Raises:
            StorageError: it cannot be made.
        """
        with self._told("making the folder"):
            make_folders(self._fs, self.folder)

    def missing(self, indices: Iterable[int] | None = None) -> list[int]:
        """Those of `indices` (None = all) that are not stored, in the same order."""
        try:
            stored = {int(match[1]) for name in os.listdir(self.folder) if (match := _CHUNK.fullmatch(name))}
        except FileNotFoundError:
            stored = set()
        return [index for index in (range(self.count) if indices is None else indices) if index not in stored]

    def complete(self) -> bool:
        """Whether every chunk is stored; whether each is whole, `read` tells."""
        return not self.missing()

    def claim(self, index: int) -> Claim | None:
        """The right to make a chunk; None if it is stored already, while another process makes it, or if the folder is
        gone.

        Raises:
            StorageError: the folder cannot be written to.
        """
        path = self.path(index)
        if path.exists():
            return None
        claim = self._take(f"{index:08d}", f"claiming chunk {index}")
        if claim is None:
            return None
        try:
            if path.exists():  # its maker finished between our two looks
                claim.release(remove=True)
                return None
            with self._told(f"clearing leftovers of chunk {index}"):
                self._sweep(index)
        except BaseException:
            claim.release()
            raise
        return claim

    def claim_finish(self) -> Claim | None:
        """The right to make something of all chunks; None while another process has it, or if the folder is gone.

        Raises:
            StorageError: the folder cannot be written to.
        """
        return self._take("finish", "claiming the finish")

    def work(
        self, indices: Iterable[int], *, start: int = 0, over: Callable[[], bool] = lambda: False
    ) -> Generator[int, None, None]:
        """Yield chunk after chunk, claimed for as long as the caller makes and writes it, until all are stored.

        While others hold what is left this waits, and takes over what they die on.

        Args:
            indices: which chunks are wanted.
            start: how many of them to pass over first; different processes begin at different places, so that they
                seldom meet.
            over: asked between chunks and while waiting; once true, nothing more is yielded.

        Raises:
            StorageError: the folder cannot be written to.
        """
        wanted = list(indices)
        wanted = wanted[start % max(len(wanted), 1) :] + wanted[: start % max(len(wanted), 1)]
        pause = _SHORTEST
        while not over() and (left := self.missing(wanted)):
            found = False
            for index in left:
                if over():
                    return
                claim = self.claim(index)
                if claim is None:
                    continue
                found = True
                try:
                    # Asked again: since the last time, someone may have finished all, and removed the chunks.
                    if over():
                        return
                    yield index
                finally:
                    claim.release(remove=self.path(index).exists())
            pause = _SHORTEST if found else min(2 * pause, _LONGEST)
            if not found:
                time.sleep(pause)

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> Path:
        """Store a claimed chunk; when this returns, it survives a power cut.

        Raises:
            StorageError: the disk is full or refuses; no other chunk is touched.
        """
        sealed = dict(tensors) | {"digest": self._digest(index, tensors)}
        with self._told(f"storing chunk {index}", file_size(sealed)):
            try:
                self._write(index, sealed)
            except FileNotFoundError:
                # Where locks are not heard, another maker of this chunk may have swept our unfinished file away.
                self._write(index, sealed)
            self._fs.sync_folder(self.folder)
        return self.path(index)

    def read(self, index: int) -> dict[str, Tensor]:
        """What `write` was given.

        Raises:
            DamagedChunkError: it is missing, changed, or of other work.
        """
        path = self.path(index)
        try:
            tensors = read_tensors(path)
        except CheckpointError as error:
            raise DamagedChunkError(str(error), index) from error
        except FileNotFoundError as error:
            raise DamagedChunkError(f"{path} is missing", index) from error
        found = tensors.pop("digest", None)
        if found is None or not torch.equal(found, self._digest(index, tensors)):
            raise DamagedChunkError(f"{path} is damaged: its bytes are not the ones that were written", index)
        return tensors

    def discard(self, index: int) -> None:
        """Remove a damaged chunk, so that it is made again.

        Raises:
            StorageError: the disk refuses.
        """
        with self._told(f"removing chunk {index}"):
            with contextlib.suppress(FileNotFoundError):
                self._fs.remove_file(self.path(index))
            self._fs.sync_folder(self.folder)

    def clear(self) -> None:
        """Remove the folder, with every chunk, claim and leftover in it. What is in use meanwhile may stay.

        Raises:
            StorageError: the disk refuses.
        """
        with self._told("removing the chunks"):
            try:
                remove_tree(self._fs, self.folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # somebody just asked for a claim in it
                    raise

    def in_use(self) -> bool:
        """Whether a living process works on a chunk."""
        return self._claims.any_held()

    def path(self, index: int) -> Path:
        """Where a chunk is stored."""
        if not 0 <= index < self.count:
            raise ValueError(f"chunk {index} is outside 0 .. {self.count - 1}")
        return self.folder / f"chunk-{index:08d}.safetensors"

    def _take(self, name: str, what: str) -> Claim | None:
        with self._told(what):
            try:
                return self._claims.take(name)
            except FileNotFoundError:
                return None

    def _write(self, index: int, sealed: Mapping[str, Tensor]) -> None:
        temporary = self.folder / f"{_unfinished(index)}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            write_file(self._fs, temporary, file_pieces(sealed))
            self._fs.rename(temporary, self.path(index))
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                self._fs.remove_file(temporary)
            raise

    def _sweep(self, index: int) -> None:
        """Who holds the claim of a chunk knows that nobody else is writing it: what lies there is of the dead."""
        for path in self.folder.glob(f"{_unfinished(index)}*"):
            with contextlib.suppress(FileNotFoundError):
                self._fs.remove_file(path)

    def _digest(self, index: int, tensors: Mapping[str, Tensor]) -> Tensor:
        digest = hashlib.sha256(f"{self.identity} {index} of {self.count}\n".encode())
        for piece in file_pieces(tensors):
            digest.update(piece)
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    def _told(self, what: str, needed: int = 0) -> contextlib.AbstractContextManager[None]:
        advice = "Chunks stored before are untouched; make room and run the same command again"
        return storage_errors(self._fs, self.folder, needed, what, advice)


def _unfinished(index: int) -> str:
    return f".tmp-{index:08d}-"


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNHEARD:
            raise
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _forget(reference: "weakref.ref[Claims]") -> None:
    claims = reference()
    if claims is not None:
        for claim in list(claims._held):
            claim.forget()
