"""`smalti demo`."""

from dataclasses import dataclass
from pathlib import Path

from smalti.errors import ConfigError
from smalti.workflows.demo import demo


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train the four backbones on the shipped emoji under one budget, and write one page that shows them side by side.

    Interrupt it at any time: the same command goes on where it stopped.
    """

    out: Path = Path("runs/demo")
    """Folder of the runs; the page is index.html in it."""
    minutes: float = 15.0
    """Time budget on this machine, set-up aside. Counts at the first start only."""
    networks: tuple[str, ...] = ("dit", "diffussm", "drwkv", "udit")
    """Which backbones."""
    seed: int = 0
    """Of everything random in the runs."""

    def run(self) -> None:
        if not self.minutes > 0:
            raise ConfigError(f"minutes must be above 0, got {self.minutes}")
        page = demo(self.out, minutes=self.minutes, seed=self.seed, networks=self.networks)
        print(f"open {page.resolve().as_uri()}")
