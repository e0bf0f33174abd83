"""`smalti cost`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from smalti.workflows.cost import cost
from smalti.workflows.cost_plot import check_plot, write_plot
from smalti.workflows.cost_report import Measuring, as_json
from smalti.workflows.cost_text import as_table


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Parameters, multiply-adds, memory and time of networks, and where other mixers become cheaper than attention."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Presets or patterns, as in dit-s-2 'drwkv-*'."""
    override: tuple[str, ...] = ()
    """Changes to all of them, as name=value: --override depth=6."""
    sizes: str = "own"
    """Sides of square latents, as in 32,64,128,256,512; own = what each preset is made for."""
    mixers: str = "own"
    """own, all, or kinds as in attention,bi_wkv: each is put into each network, everything else staying the same."""
    measure: bool = True
    """Time a forward and a training step, too."""
    measuring: Annotated[Measuring, tyro.conf.arg(name="")] = field(default_factory=Measuring)
    """How to time."""
    json: bool = False
    """One JSON object instead of tables."""
    plot: Path | None = None
    """A picture of cost against size, .svg or .png; crossovers need --mixers."""

    def run(self) -> None:
        if self.plot is not None:
            check_plot(self.plot, self.sizes)
        report = cost(
            self.names,
            override=self.override,
            sizes=self.sizes,
            mixers=self.mixers,
            measuring=self.measuring if self.measure else None,
            progress=_progress,
        )
        if self.plot is not None:
            write_plot(report, self.plot)
        print(as_json(report) if self.json else as_table(report))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
