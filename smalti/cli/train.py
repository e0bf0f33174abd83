"""`smalti train`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from smalti.errors import PreemptedError
from smalti.training.config import RunConfig
from smalti.workflows.dry_run import dry_run
from smalti.workflows.recipes import load_settings, told_of_data
from smalti.workflows.train import train
from smalti.world import World


@dataclass(frozen=True)
class Train:
    """Train a model, or continue the run in --out: the same command again goes on where it stopped.

    Processes started by `torchrun` share the run.

    Settings may come from a file, `--config run.yaml`, or a recipe's name (`smalti recipes` lists them); flags change
    them. Every run folder holds its own config.yaml.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Try everything but the time: data, memory, run folder, two steps and a checkpoint; --out stays as it is."""
    steal: bool = False
    """Take over a run folder that another machine left locked; only when its run is known to be over."""

    @classmethod
    def from_file(cls, path: str) -> "Train":
        return cls(load_settings(path))

    def run(self) -> None:
        with told_of_data(self.config):
            self._run()

    def _run(self) -> None:
        if self.dry_run:
            dry_run(self.config, lambda line: print(line, flush=True), steal=self.steal)
            return
        first = World.launched().rank == 0
        try:
            result = train(self.config, steal=self.steal)
        except PreemptedError as error:
            if first:
                raise
            raise SystemExit(error.exit_code) from error  # all stop at the same step, and one says so
        if not first:
            return
        if result.validation is not None and result.baselines is not None:
            print(
                f"validation loss {result.validation.mean:.4f}; the best linear denoiser has "
                f"{result.baselines.linear.mean:.4f}, the mean image {result.baselines.constant.mean:.4f}"
            )
        print(f"model in {result.out / 'model'}; draw from it with `smalti sample {result.out}`")
