"""The command `smalti`: verbs, each a frozen dataclass whose fields are its flags. A verb translates, nothing else."""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from smalti.errors import ConfigError, SmaltiError

# verb -> (module, class, what `smalti --help` says); modules load on use, so that help is instant
VERBS: dict[str, tuple[str, str, str]] = {
    "demo": ("smalti.cli.demo", "Demo", "train on the shipped emoji, sample, and write a page that shows it all"),
    "train": ("smalti.cli.train", "Train", "train on images or latents; the same command continues it"),
    "sample": ("smalti.cli.sample", "Sample", "draw images from a trained model"),
    "evaluate": (
        "smalti.cli.evaluate",
        "Evaluate",
        "FID and others of runs, folders or .npz files, and how each was made",
    ),
    "compare": ("smalti.cli.compare", "Compare", "numbers of several results side by side, if they were made alike"),
    "data check": ("smalti.cli.data", "DataCheck", "look at every image of a folder or of tar shards, once"),
    "data build": ("smalti.cli.data", "DataBuild", "make the larger emoji set from public packages"),
    "encode": ("smalti.cli.encode", "Encode", "turn images into latents, once, to train on"),
    "autoencoder": ("smalti.cli.autoencoder", "Autoencoder", "train a small autoencoder, for latents of your own"),
    "convert": ("smalti.cli.convert", "Convert", "turn released or diffusers' weights into a model folder, and back"),
    "presets": ("smalti.cli.presets", "Presets", "list the networks, with counted and published sizes and costs"),
    "recipes": ("smalti.cli.recipes", "Recipes", "list the papers' full-scale trainings, for `train --config NAME`"),
    "cost": ("smalti.cli.cost", "Cost", "parameters, multiply-adds, memory, time; where mixers beat attention"),
    "plan": ("smalti.cli.plan", "Plan", "what a training run needs before it starts: memory, disk, hours, cost"),
    "launch": ("smalti.cli.launch", "Launch", "print a job file for a cluster: torchrun, Slurm, Kubernetes, SkyPilot"),
}
GROUPS = {
    "from images to numbers": ("demo", "train", "sample", "evaluate", "compare"),
    "what goes in": ("data check", "data build", "encode", "autoencoder", "convert"),
    "before a long run": ("presets", "recipes", "cost", "plan", "launch"),
}

INTERRUPTED, PIPE_CLOSED = 130, 141
PATIENCE = 2.0  # seconds that a process leaves to the first one to say the same


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done; 2 wrong flags; 64 wrong settings; 65 unusable data or checkpoint; 70 numbers not finite; 71 a worker that
    reads data is gone; 73 run folder in use; 74 disk full; 75 stopped on request and saved, run again to continue.
    Anything else is a bug, with traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        from smalti import __version__

        print(f"smalti {__version__}")
        return 0
    try:
        read_command(*_split_verb(arguments)).run()
        sys.stdout.flush()
    except SmaltiError as error:
        _say(f"smalti: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        print("smalti: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough, as in `smalti presets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return 0


def _split_verb(arguments: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        verb = " ".join(arguments[:words])
        if verb in VERBS:
            return verb, arguments[words:]
    group = [verb for verb in VERBS if verb.startswith(arguments[0] + " ")]
    if group:
        raise ConfigError(f"`smalti {arguments[0]}` needs one more word: {' or '.join(group)}")
    from smalti.config import did_you_mean

    raise ConfigError(f"there is no command {arguments[0]!r}{did_you_mean(arguments[0], VERBS)}; see `smalti --help`")


def read_command(verb: str, arguments: list[str]) -> Any:
    """A verb with its flags read, and not yet run.

    Raises:
        ConfigError: a value that settings refuse. SystemExit: wrong flags, which were told on stderr; or --help.
    """
    import tyro

    module, name, _ = VERBS[verb]
    command = getattr(import_module(module), name)
    default = None
    if hasattr(command, "from_file"):
        path, arguments = _take_config(arguments)
        default = command.from_file(path) if path is not None else None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(command, args=arguments, prog=f"smalti {verb}", default=default)
    except SystemExit as end:
        # A value that a nested config refuses would come as a box in tyro's words; it is one line of ours.
        if (error := _refusal(end)) is not None:
            raise error from None
        _say(said.getvalue())
        raise
    return config


def _say(text: str) -> None:
    """Why a command ends, on stderr. Of processes that end for one reason, the first says it.

    Another one waits for a moment: if the first has the same to say, it ends, and `torchrun` then stops the others.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        sys.stderr.write(text)
    elif not _stopped_within(PATIENCE):
        says_who = f"process {rank} of " in text
        sys.stderr.write(text if says_who else f"process {rank}: {text}")
    sys.stderr.flush()


def _stopped_within(seconds: float) -> bool:
    """Whether SIGTERM comes; it does not end this process, which still has its exit code to return."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        end = time.monotonic() + seconds
        while not came and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, before)
    return bool(came)


def _refusal(error: BaseException | None) -> ConfigError | None:
    """The ConfigError on the way to this error, if there is one."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """`--config run.yaml` gives the defaults; it is taken out before the flags are read."""
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise ConfigError("--config needs the path of a YAML file")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _help() -> str:
    width = max(map(len, VERBS))
    lines = []
    for group, verbs in GROUPS.items():
        lines += [f"{group}:", *(f"  smalti {verb.ljust(width)}  {VERBS[verb][2]}" for verb in verbs), ""]
    return "\n".join(
        [
            "smalti: diffusion backbones, each exact to its paper, on one laptop core, a GPU or many.",
            "",
            *lines,
            "`smalti VERB --help` lists a command's settings. A first picture in minutes: `smalti demo`.",
        ]
    )
