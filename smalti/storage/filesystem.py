"""The few file operations that storing needs, as an interface: a test puts one in between that fails or forgets.

Only what changes the disk is here. Reading goes through pathlib, because what a reader must withstand, files that are
short, flipped or gone, can be made with real files.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from smalti.errors import StorageError

Buffer = bytes | memoryview


@runtime_checkable
class Writer(Protocol):
    """A new file, open for writing."""

    def write(self, data: Buffer) -> None: ...

    def sync(self) -> None:
        """Return when every byte written so far would survive a power cut."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class FileSystem(Protocol):
    """Every operation may raise OSError, and is done when it returns."""

    def make_folder(self, path: Path) -> None: ...

    def create(self, path: Path) -> Writer:
        """Open a file that must not exist yet."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Atomic, within one folder. A target that is a file is replaced."""
        ...

    def sync_folder(self, path: Path) -> None:
        """Return when the names in the folder would survive a power cut."""
        ...

    def remove_file(self, path: Path) -> None: ...

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        ...

    def free_bytes(self, path: Path) -> int: ...


class LocalFileSystem:
    """The machine's own."""

    def make_folder(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> Writer:
        return _LocalWriter(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove_file(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


class _LocalWriter:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: Buffer) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def sync(self) -> None:
        if sys.platform == "darwin":
            # There, fsync stops at the drive's own cache; this asks the drive too.
            fcntl.fcntl(self._descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class FileRecord(NamedTuple):
    """What a file must be when it is read back."""

    bytes: int
    sha256: str


def write_file(fs: FileSystem, path: Path, pieces: Iterable[Buffer]) -> FileRecord:
    """Write a new file so that it survives a power cut once its folder is synced; the hash is taken on the way."""
    digest, size = hashlib.sha256(), 0
    writer = fs.create(path)
    try:
        for piece in pieces:
            writer.write(piece)
            digest.update(piece)
            size += len(piece)
        writer.sync()
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            writer.close()
        raise
    writer.close()  # a network file system may report a failed write only here
    return FileRecord(size, digest.hexdigest())


def read_record(path: Path) -> FileRecord:
    """Size and hash of a stored file."""
    with path.open("rb") as file:
        return FileRecord(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def make_folders(fs: FileSystem, folder: Path) -> None:
    """Make a folder and its missing parents, each name synced."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process may be as fast
            fs.make_folder(path)
    for path in missing or [folder]:
        fs.sync_folder(path.parent)


def remove_tree(fs: FileSystem, folder: Path) -> None:
    """Remove a folder and all that is in it. What someone else removed meanwhile is no error."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                remove_tree(fs, path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    fs.remove_file(path)
        fs.remove_folder(folder)


def require_space(fs: FileSystem, folder: Path, needed: int, what: str) -> None:
    """Refuse early: a fifth more than predicted must be free, for what else is written meanwhile.

    Raises:
        StorageError: it is not.
    """
    free = fs.free_bytes(folder)
    if free < needed * 1.2:
        raise StorageError(
            f"{what} does not fit into {folder}: it needs {needed:,} bytes and a fifth more to spare, "
            f"{free:,} are free. What was stored before is untouched; make room and run again",
        )


@contextlib.contextmanager
def storage_errors(fs: FileSystem, folder: Path, needed: int, what: str, advice: str) -> Iterator[None]:
    """Turn any OSError of the body into a StorageError that names the folder and the bytes needed and free.

    Args:
        needed: 0 = unknown.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        need = f"it needs {needed:,} bytes, " if needed else ""
        raise StorageError(
            f"{what} in {folder} failed: {error.strerror or error}; {need}{free_text(folder, fs)}. {advice}",
        ) from error


def free_text(path: Path, fs: FileSystem | None = None) -> str:
    """How much room there is where `path` is or would be, as part of a message."""
    there = next((place for place in (path, *path.parents) if place.exists()), path)
    try:
        return f"{(fs or LocalFileSystem()).free_bytes(there):,} bytes are free"
    except OSError:
        return "an unknown number of bytes are free"
