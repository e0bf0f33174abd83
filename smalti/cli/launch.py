"""`smalti launch`."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smalti.cli import VERBS, read_command
from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.report.files import write_text
from smalti.workflows.launch import SHARED, Emit, LaunchRequest, LaunchSettings, launch_file

LAUNCHED = ("train", *SHARED)
_STARTS: dict[Emit, tuple[str, ...]] = {
    "torchrun": ("bash",),
    "slurm": ("sbatch",),
    "k8s": ("kubectl", "apply", "-f"),
    "skypilot": ("sky", "jobs", "launch"),
}


@dataclass(frozen=True, kw_only=True)
class Launch(LaunchSettings):
    """Print a file that starts a command on one machine or many, and again whenever it was stopped or killed.

    The command stands at the end: `smalti launch --emit slurm --nodes 2 --gpus-per-node 8 -- train --config run.yaml`.
    """

    command: Annotated[tuple[str, ...], tyro.conf.Positional]
    """After `--`: train, sample or encode with its flags, which are checked now."""
    file: Path | None = None
    """Where to write it. Left out: to standard output."""

    def run(self) -> None:
        verb = self.command[0] if self.command else ""
        if verb and verb not in LAUNCHED:
            hint = did_you_mean(verb, LAUNCHED) if verb not in VERBS else f"; choose from {', '.join(LAUNCHED)}"
            raise ConfigError(f"launch starts what can be started again; {verb!r} is not of these{hint}")
        out, mirror = _folders(verb, list(self.command[1:])) if verb else ("", "")
        fields = {name: value for name, value in vars(self).items() if name != "file"}
        made_by = ("smalti", *sys.argv[1:]) if sys.argv[1:2] == ["launch"] else ("smalti", "launch", "...")
        text = launch_file(LaunchRequest(**fields, out=out, mirror=mirror, made_by=made_by))
        if self.file is None:
            sys.stdout.write(text)
            return
        write_text(self.file, text)
        if self.emit == "torchrun":
            self.file.chmod(self.file.stat().st_mode | 0o111)
        print(self.file)
        print(f"start it with `{shlex.join([*_STARTS[self.emit], str(self.file)])}`", file=sys.stderr)


def _folders(verb: str, arguments: list[str]) -> tuple[str, str]:
    """Where the command will write, and what it copies checkpoints to; a flag that is wrong is refused here and now."""
    command = read_command(verb, arguments)
    if verb != "train":
        return str(command.out), ""
    return str(command.config.out), command.config.store.mirror
