"""Which tar files a user means: a folder of them, one of them, a pattern, or a URL of any of these."""

import itertools
import re
from fnmatch import fnmatchcase
from pathlib import Path

from smalti.data.folder_pass import IMAGE_SUFFIXES
from smalti.data.shard_manifest import MANIFEST, read_manifest
from smalti.errors import ConfigError, DataError
from smalti.storage.objects import ByteStore, is_url, open_store

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_MOST = 1_000_000


def is_shards(spec: str | Path) -> bool:
    """Whether this names tar shards: a URL, a name or pattern that ends with .tar, or a folder of such files alone."""
    text = str(spec)
    if is_url(text) or text.endswith((".tar", *_COMPRESSED)):
        return is_url(text) or not Path(text).is_dir()
    folder = Path(text)
    if not folder.is_dir():
        return False
    names = [child.name for child in folder.iterdir() if not child.name.startswith(".")]
    suffixes = {Path(name).suffix.lower() for name in names}
    # Images or class folders beside a forgotten archive stay a folder of images.
    return ".tar" in suffixes and not suffixes & IMAGE_SUFFIXES and not any((folder / name).is_dir() for name in names)


def names_all(spec: str | Path) -> bool:
    """Whether this names a place with all shards in it, and not some of them."""
    head = str(spec).partition("?")[0] if is_url(spec) else str(spec)
    return not head.endswith(".tar") or (not is_url(head) and Path(head).is_dir())


def find_shards(spec: str | Path) -> tuple[ByteStore, tuple[str, ...]]:
    """The store and the names of the shards in it, in order.

    Raises:
        DataError: there is none, or they are compressed.
        ConfigError: the place cannot be listed and names no files, or nothing reads such URLs.
        StorageError: the store cannot be reached.
    """
    text = str(spec)
    head, mark, query = text.partition("?") if is_url(text) else (text, "", "")
    if head.endswith(_COMPRESSED):
        raise DataError(f"{head}: compressed shards cannot be read by place; unpack them to .tar")
    if names_all(text):
        store = open_store(text)
        found = [name for name in _listed(store) if name.endswith(".tar") and "/" not in name and name[0] != "."]
        if not found:
            raise DataError(
                f"{store.place}: no tar shard in it; give a folder that holds some. "
                "A folder of images is given as a path, not as a URL"
            )
        return store, tuple(found)
    place, _, pattern = head.rpartition("/")
    store = open_store((place or ("/" if head.startswith("/") else ".")) + mark + query)
    names = sorted(set(expand_braces(pattern)))
    if any(character in pattern for character in "*?["):
        there = [name for name in store.names() if "/" not in name]
        names = [name for name in there if any(fnmatchcase(name, wanted) for wanted in names)]
        if not names:
            raise DataError(f"{store.place}: no shard fits {pattern!r}")
    return store, tuple(names)


def _listed(store: ByteStore) -> list[str]:
    """What lies in a place, or where that cannot be asked, what its manifest lists."""
    try:
        return store.names()
    except ConfigError as error:
        promises = read_manifest(store)
        if promises is None:
            raise ConfigError(f"{error}, or put webdataset's {MANIFEST}, which lists them, beside them") from error
        return sorted(promises)


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` and `{a,b}.tar` as a shell spells them out.

    Raises:
        DataError: more than a million names.
    """
    parts = _BRACES.split(pattern)
    choices: list[list[str]] = []
    count = 1
    for place, part in enumerate(parts):
        if place % 2 == 0:
            choices.append([part])
            continue
        bounds = _RANGE.fullmatch(part)
        if bounds:
            low, high = int(bounds[1]), int(bounds[2])
            width = len(bounds[1]) if bounds[1].startswith("0") or len(bounds[1]) == len(bounds[2]) else 0
            count *= max(0, high - low + 1)
            spelled = range(low, high + 1) if count <= _MOST else ()
            choices.append([f"{number:0{width}}" for number in spelled])
        else:
            choices.append(part.split(","))
            count *= len(choices[-1])
        if not 0 < count <= _MOST:
            raise DataError(f"{pattern!r} names {count:,} shards; expected 1 to {_MOST:,}")
    return ["".join(chosen) for chosen in itertools.product(*choices)]
