"""Whether a folder can be written to, asked before hours of work whose result it is to hold."""

import os
from pathlib import Path

from smalti.errors import ConfigError, StorageError


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that cannot be made or written to; nothing is made here.

    Args:
        flag: of the setting that would put it elsewhere.

    Raises:
        ConfigError: it, or a folder above it, is a file. StorageError: nobody may write there.
    """
    here = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not here.is_dir():
        where = f"{folder}: {here}" if here != folder else str(here)
        raise ConfigError(f"{flag} {where} is a file; give a folder")
    if not os.access(here, os.W_OK | os.X_OK):
        raise StorageError(f"{here} cannot be written to; choose another place with {flag}")
