"""`smalti data`: build the larger emoji set, check what a run would be trained on."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smalti.errors import ConfigError, DataError
from smalti.workflows.data import build_emoji64
from smalti.workflows.data_check import check


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
    """Look at every image of a folder, of tar shards, or at latents: sizes, formats, classes, and each file that cannot
    be used, with the reason. What was found is stored: training then starts without looking again."""

    path: Annotated[str, tyro.conf.Positional]
    """Folder of images, tar shards (a folder of them, shards/train-{000..099}.tar, or a URL), latents, or a set's
    name."""
    all: bool = False
    """Name every rejected file instead of the first 50."""
    beside: bool = False
    """Store the index in the data's own folder, as .smalti-index, for everybody who reads it; not in your cache."""
    processes: int | None = None
    """How many look at shards at the same time. By default one for each core, at most 8."""

    def run(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"--processes must be at least 1, got {self.processes}")
        report = check(
            self.path,
            listed=None if self.all else 50,
            beside=self.beside,
            processes=self.processes,
            progress=_progress,
        )
        print(report.text)
        if not report.usable:
            raise DataError(f"{self.path}: nothing in it can be used as it is")


def _progress(done: int, found: int) -> None:
    if sys.stderr.isatty() and (done % 100 == 0 or done == found):
        print(f"\r{done} / {found}", end="\n" if done == found else "", file=sys.stderr, flush=True)
