"""Writing what people look at: whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smalti.errors import StorageError


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
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}; free space or choose another --out"
        ) from error


def write_text(path: Path, text: str) -> None:
    """A text file, UTF-8.

    Raises:
        StorageError: the disk is full or refuses.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
