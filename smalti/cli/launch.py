"""`smalti launch`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from smalti.cli import VERBS, read_command
from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.report.files import write_text
from smalti.workflows.launch import SHARED, Emit, LaunchRequest, launch_file

LAUNCHED = ("train", *SHARED)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Print a file that starts a command on one machine or many, and again whenever it was stopped or killed.

    The command stands at the end: `smalti launch --emit slurm --nodes 2 --gpus-per-node 8 -- train --config run.yaml`.
    """

    command: Annotated[tuple[str, ...], tyro.conf.Positional]
    """After `--`: train, sample or encode with its flags, which are checked now."""
    emit: Emit
    """torchrun: a bash script. slurm: for sbatch. k8s: for kubectl apply. skypilot: for sky jobs launch."""
    file: Path | None = None
    """Where to write it. Left out: to standard output."""
    name: str = "smalti"
    """Of the job."""
    nodes: int = 1
    """Machines that train together."""
    gpus_per_node: int = 1
    """0 = on the CPU."""
    processes_per_node: int | None = None
    """Left out: one per GPU."""
    array: int = 0
    """Of sample and encode: this many jobs that share the work (slurm, k8s)."""
    chunks: int | None = None
    """Chunks in all, dealt out to the array by number. Left out: each job makes whichever are missing."""
    retries: int = 5
    """Starts in a row without a newer checkpoint before it gives up."""
    backoff: int = 15
    """Seconds before the second start; doubles from one to the next, up to 32 times this."""
    grace: int = 120
    """Seconds from the signal to the end. Must exceed twice the time of a save, which `smalti plan` shows."""
    port: int = 29_400
    """Several machines meet at this port of the first."""
    image: str = ""
    """Container image with Python, torch and smalti (k8s, skypilot)."""
    claim: str = ""
    """PersistentVolumeClaim that data and runs lie on (k8s)."""
    partition: str = ""
    """Of Slurm."""
    time_limit: str = ""
    """Of Slurm, such as 12:00:00."""
    sbatch: tuple[str, ...] = ()
    """More options of Slurm, as in `--sbatch account=me cpus-per-task=16`."""
    accelerators: str = "H100"
    """Kind of GPU (skypilot)."""
    install: str = ""
    """What a fresh machine installs (skypilot). Left out: this version of smalti by pip."""

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


def _folders(verb: str, arguments: list[str]) -> tuple[str, str]:
    """Where the command will write, and what it copies checkpoints to; a flag that is wrong is refused here and now."""
    command = read_command(verb, arguments)
    if verb != "train":
        return str(command.out), ""
    return str(command.config.out), command.config.store.mirror
