"""`smalti data`: build the larger emoji set, check a folder of images."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smalti.workflows.data import build_emoji64, describe


@dataclass(frozen=True, kw_only=True)
class DataBuild:
    """Make an image set from public packages: emoji64, 7,562 emoji in two styles, 64 x 64, 9 classes."""

    name: Annotated[Literal["emoji64"], tyro.conf.Positional]
    """The set to build."""
    tarball: tuple[Path, ...] = ()
    """The two npm tarballs, if they are already here; otherwise they are downloaded with `npm pack` (130 MB)."""
    out: Path | None = None
    """Folder to build into. By default $XDG_CACHE_HOME/smalti or ~/.cache/smalti, where `emoji64` is looked for."""

    def run(self) -> None:
        build_emoji64(self.tarball, self.out, report=print)


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """Look at every image of a folder: sizes, formats, classes, and each file that cannot be used, with the reason."""

    path: Annotated[str, tyro.conf.Positional]
    """Folder of images, or the name of a set."""
    all: bool = False
    """Name every rejected file instead of the first 50."""

    def run(self) -> None:
        print(describe(self.path, listed=None if self.all else 50, progress=_progress))


def _progress(done: int, found: int) -> None:
    if sys.stderr.isatty() and (done % 100 == 0 or done == found):
        print(f"\r{done} / {found} files", end="\n" if done == found else "", file=sys.stderr, flush=True)
