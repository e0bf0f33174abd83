"""`smalti demo`."""

from dataclasses import dataclass
from pathlib import Path

from smalti.errors import ConfigError
from smalti.workflows.demo import demo


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a small DiT on the shipped emoji, draw samples, and write one page that shows what it learned.

    Interrupt it at any time: the same command goes on where it stopped.
    """

    out: Path = Path("runs/demo")
    """Run folder; the page is index.html in it."""
    minutes: float = 11.0
    """Time budget on this machine, set-up aside. Counts at the first start only."""
    seed: int = 0
    """Of everything random in the run."""

    def run(self) -> None:
        if not self.minutes > 0:
            raise ConfigError(f"minutes must be above 0, got {self.minutes}")
        page = demo(self.out, minutes=self.minutes, seed=self.seed)
        print(f"open {page.resolve().as_uri()}")
