"""Whether a folder can be written to, asked before hours of work whose result it is to hold."""

import os
import re
from pathlib import Path

from smalti.errors import ConfigError, StorageError

# What marks a folder as the home of something that other verbs must not write into.
_HOMES = {"resolved.yaml": "a training run", "latents.json": "latents", "autoencoder.yaml": "an autoencoder"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: a Path has dropped the other


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written to; nothing is made here.

    Args:
        flag: of the setting that would put it elsewhere.

    Raises:
        ConfigError: it is a URL; or it, or a folder above it, is a file. StorageError: nobody may write there.
    """
    if _URL.match(str(folder)):
        raise ConfigError(f"{flag} {folder} is a URL, and only checkpoints go to such places; give a local folder")
    here = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not here.is_dir():
        where = f"{folder}: {here}" if here != folder else str(here)
        raise ConfigError(f"{flag} {where} is a file; give a folder")
    if not os.access(here, os.W_OK | os.X_OK):
        raise StorageError(f"{here} cannot be written to; choose another place with {flag}")


def refuse_other_home(folder: Path, flag: str, mark: str, source: str) -> None:
    """Refuse a folder that holds something else, or the images themselves.

    Args:
        mark: the file that stands in folders of the caller's kind, and does not speak against it.
        source: of the images or latents that are read.

    Raises:
        ConfigError: it does.
    """
    for name, what in _HOMES.items():
        if name != mark and (folder / name).exists():
            raise ConfigError(f"{folder} holds {what}; choose another {flag}")
    if folder.exists() and os.path.exists(source) and os.path.samefile(folder, source):
        raise ConfigError(f"{folder} holds the images that are read; choose another {flag}")
