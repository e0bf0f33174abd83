"""A file that stands in its place whole or not at all, whoever else writes there and whenever a process is killed."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from smalti.storage.filesystem import Buffer, FileRecord, FileSystem, write_file
from smalti.storage.process import Process, is_dead

_SUFFIX = ".tmp"


def replace_file(fs: FileSystem, path: Path, pieces: Iterable[Buffer]) -> FileRecord:
    """Write beside `path` under another name, sync, and put it in the place of `path`. On an error nothing is left.

    The name carries the process, so that two writers never meet in one file; what a killed process left is removed by
    the next one on the same machine.
    """
    own = Process.current().token
    for stale in _stale(path, own):
        with contextlib.suppress(FileNotFoundError):  # another process cleans up too
            fs.remove_file(stale)
    temporary = path.with_name(f".{path.name}.{own}{_SUFFIX}")
    try:
        record = write_file(fs, temporary, pieces)
        fs.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            fs.remove_file(temporary)
        raise
    fs.sync_folder(path.parent)
    return record


def _stale(path: Path, own: str) -> Iterator[Path]:
    prefix = f".{path.name}."
    for name in os.listdir(path.parent):
        if name.startswith(prefix) and name.endswith(_SUFFIX):
            token = name[len(prefix) : -len(_SUFFIX)]
            if token == own or is_dead(token):
                yield path.with_name(name)
