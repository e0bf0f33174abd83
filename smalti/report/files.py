"""Writing what people look at: whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smalti.errors import StorageError
from smalti.storage.filesystem import LocalFileSystem, free_text
from smalti.storage.replacing import replace_file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` at the end: a reader never meets half a file.

    Raises:
        StorageError: the disk is full or refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise _refused(path, error) from error


def write_text(path: Path, text: str) -> None:
    """A text file, UTF-8. When this returns, it survives a power cut.

    Raises:
        StorageError: the disk is full or refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(LocalFileSystem(), path, [text.encode()])
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> StorageError:
    free = free_text(path.parent)
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}; {free}: make room or choose another --out"
    )
