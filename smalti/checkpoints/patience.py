"""Folders on a network: what another machine has done shows late, and what was known may be out of date.

NFS answers ESTALE for a file or folder that was replaced behind its cache, and repeats a request whose answer was lost,
so that a folder just made, or a rename just done, seems to have been there before. Each is waited out for some seconds;
what lasts longer is told as the OSError that it is.
"""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from smalti.storage.filesystem import FileSystem, Writer, remove_tree

PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds between two looks

T = TypeVar("T")


def patiently(do: Callable[[], T], *, late: bool = True) -> T:
    """Do what may fail for a while.

    Args:
        do: may raise ESTALE.
        late: what it needs is known to be there, so that "no such file" means not yet.
    """
    for pause in PAUSES:
        try:
            return do()
        except OSError as error:
            if error.errno != errno.ESTALE and not (late and error.errno == errno.ENOENT):
                raise
            time.sleep(pause)
    return do()


def clear_tree(fs: FileSystem, folder: Path) -> None:
    """`remove_tree`, of a folder whose listing may be out of date."""
    patiently(lambda: remove_tree(fs, folder), late=False)


class PatientFileSystem:
    """A file system whose delays are waited out.

    Args:
        fs: the one that does the work.
        shared: other machines make folders that this one writes into.
    """

    def __init__(self, fs: FileSystem, *, shared: bool) -> None:
        self._fs, self._shared = fs, shared

    def make_folder(self, path: Path) -> None:
        """A repeated request finds the folder that the first one made; so does who is not the first to want it."""

        def make() -> None:
            try:
                self._fs.make_folder(path)
            except FileExistsError:
                if not path.is_dir() or any(path.iterdir()):
                    raise

        patiently(make, late=False)

    def create(self, path: Path) -> Writer:
        """Open a file that must not exist yet, in a folder that another machine may just have made."""
        return patiently(lambda: self._fs.create(path), late=self._shared)

    def rename(self, source: Path, target: Path) -> None:
        """A repeated request finds no source, and the target in its place."""

        def move() -> None:
            try:
                self._fs.rename(source, target)
            except FileNotFoundError:
                if source.exists() or not target.is_dir():
                    raise

        patiently(move, late=False)

    def sync_folder(self, path: Path) -> None:
        patiently(lambda: self._fs.sync_folder(path), late=False)

    def remove_file(self, path: Path) -> None:
        patiently(lambda: self._fs.remove_file(path), late=False)

    def remove_folder(self, path: Path) -> None:
        patiently(lambda: self._fs.remove_folder(path), late=False)

    def free_bytes(self, path: Path) -> int:
        return patiently(lambda: self._fs.free_bytes(path), late=False)
