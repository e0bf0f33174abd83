"""`smalti compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smalti.report.quality import as_text
from smalti.workflows.compare import check_out, compare, write_comparison


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put results side by side, if they were made alike; with the uncertainty of each, and of their differences."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files that `smalti evaluate` wrote, or run folders."""
    published: tuple[str, ...] = ()
    """Presets or families whose published numbers to show below, apart: dit-xl-2 or DiT,ADM."""
    allow: tuple[str, ...] = ()
    """Parts of the protocol that may differ, as in guidance_scale,count; a footnote says so. unknown = what nobody
    knows."""
    sort: str = ""
    """Number whose order the rows take, as in fid."""
    out: Path | None = None
    """Write it, too: .md, .html (with charts), .json (for programs) or .txt."""

    def run(self) -> None:
        if self.out is not None:
            check_out(self.out)
        comparison = compare(
            self.results, published_of=_split(self.published), allow=_split(self.allow), sort=self.sort
        )
        if self.out is not None:
            write_comparison(comparison, self.out)
        print(as_text(comparison.table))


def _split(words: tuple[str, ...]) -> list[str]:
    return [part.strip() for word in words for part in word.split(",") if part.strip()]
