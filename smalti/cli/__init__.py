"""The command `smalti`: verbs, each a frozen dataclass whose fields are its flags. A verb translates, nothing else."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from smalti.errors import ConfigError, SmaltiError

# verb -> (module, class, what `smalti --help` says); modules load on use, so that help is instant
VERBS: dict[str, tuple[str, str, str]] = {
    "train": ("smalti.cli.train", "Train", "train a model on an image set or a folder; the same command continues it"),
    "sample": ("smalti.cli.sample", "Sample", "draw images from a trained model"),
    "evaluate": (
        "smalti.cli.evaluate",
        "Evaluate",
        "FID and others of runs, folders or .npz files, and how each was made",
    ),
    "autoencoder": ("smalti.cli.autoencoder", "Autoencoder", "train a small autoencoder, for latents of your own"),
    "encode": ("smalti.cli.encode", "Encode", "turn images into latents, once, to train on"),
    "compare": ("smalti.cli.compare", "Compare", "numbers of several results side by side, if they were made alike"),
    "convert": ("smalti.cli.convert", "Convert", "turn released or diffusers' weights into a model folder, and back"),
    "presets": ("smalti.cli.presets", "Presets", "list the networks, with counted and published sizes and costs"),
    "recipes": ("smalti.cli.recipes", "Recipes", "list the papers' full-scale trainings, for `train --config NAME`"),
    "cost": ("smalti.cli.cost", "Cost", "parameters, multiply-adds, memory, time; where mixers beat attention"),
    "launch": ("smalti.cli.launch", "Launch", "print a job file: torchrun, Slurm, Kubernetes, SkyPilot; it restarts"),
    "plan": ("smalti.cli.plan", "Plan", "what a training run needs before it starts: memory, disk, hours, cost"),
    "demo": ("smalti.cli.demo", "Demo", "train on the shipped emoji, sample, and write a page that shows it all"),
    "data check": ("smalti.cli.data", "DataCheck", "look at every image of a folder before training on it"),
    "data build": ("smalti.cli.data", "DataBuild", "make the larger emoji set from public packages"),
}

INTERRUPTED, PIPE_CLOSED = 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done; 2 wrong flags; 64 wrong settings; 65 unusable data or checkpoint; 70 numbers not finite; 73 run folder in
    use; 74 disk full; 75 stopped on request and saved, run again to continue. Anything else is a bug, with traceback.
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
        print(f"smalti: {error}", file=sys.stderr)
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
        sys.stderr.write(said.getvalue())
        raise
    return config


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
    lines = [f"  smalti {verb.ljust(width)}  {text}" for verb, (_, _, text) in VERBS.items()]
    return "\n".join(
        [
            "smalti: diffusion backbones, each exact to its paper, on one laptop core or a GPU.",
            "",
            *lines,
            "",
            "`smalti VERB --help` lists a command's settings. A first picture in minutes: `smalti demo`.",
        ]
    )
