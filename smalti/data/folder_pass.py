"""One checked pass over a folder of images: every file is opened and decoded once, because most damage shows only then.

Layout: either all images lie directly in the folder (no classes), or each lies somewhere below one sub-folder of it,
whose name is its class.
"""

import hashlib
import os
import stat
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smalti.data.decoding import Decoded, UnusableImageError, decode, looks_like_image
from smalti.errors import DataError

FRESH_NS = 2_000_000_000  # coarser than the clock of any disk that counts
_MAX_FILE_BYTES = 1 << 29
# What promises to be an image, whether it can be decoded here or not. Other files count only if they start like one.
IMAGE_SUFFIXES = frozenset(
    """.jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .avif .heic .heif .jp2 .jxl .ico .psd .tga .eps
    .svg .ppm .pgm .exr .hdr""".split()  # noqa: SIM905 (a list literal is one per line)
)


@dataclass(frozen=True)
class IndexEntry:
    """One usable file.

    Attributes:
        path: below the root, with `/`; names that are not UTF-8 as `os.fsdecode` spells them.
        size: bytes.
        mtime_ns: time of the last change, in nanoseconds.
        sha256: of the file's bytes, in hex.
        mode: Pillow's name of the pixel format in the file.
        image_size: rows and columns, upright.
        class_label: position in the class names; -1 without classes.
        notes: what was left out on decoding.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    format: str
    mode: str
    image_size: tuple[int, int]
    class_label: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RejectedFile:
    """A file or folder that cannot be used, and why. `other` marks what never claimed to be an image, like a text."""

    path: str
    reason: str
    other: bool = False


class Stamp(NamedTuple):
    """What the disk says of a file without opening it; a file with another one is looked at again.

    The time of the last change of anything (`ctime`) cannot be set back, as that of the content can.
    """

    size: int
    mtime_ns: int
    ctime_ns: int


Known = Mapping[str, tuple[Stamp, "IndexEntry | RejectedFile"]]


@dataclass(frozen=True)
class FolderIndex:
    """All that one pass over a folder found, in order of path.

    Attributes:
        known: the findings about each file by its path, for the next pass; without those that are too fresh to tell.
        decoded: how many files were opened, because nothing was known of them.
    """

    root: Path
    class_names: tuple[str, ...]
    entries: tuple[IndexEntry, ...]
    rejected: tuple[RejectedFile, ...]
    known: Known = field(default_factory=dict, repr=False)
    decoded: int = 0

    @property
    def unusable(self) -> tuple[RejectedFile, ...]:
        """Rejected files that should have been images."""
        return tuple(r for r in self.rejected if not r.other)

    @property
    def class_labels(self) -> np.ndarray:
        """int64 (N,); of length 0 without classes."""
        return np.asarray([e.class_label for e in self.entries] if self.class_names else [], dtype=np.int64)


OnImage = Callable[[int, IndexEntry, Decoded], None]


def index_folder(
    root: Path,
    *,
    known: Known | None = None,
    on_image: OnImage | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FolderIndex:
    """Look at every file below `root` once.

    Links that lead outside `root` are not followed, and no folder is entered twice. Names that start with a dot are
    skipped.

    Args:
        known: of an earlier pass; files that are as they were then are not opened.
        on_image: called with the position in the index, the entry and the decoded image of each usable file that is
            opened.
        progress: called with (files done, files found) after each file.

    Raises:
        DataError: `root` is missing or no folder, has images both directly in it and in sub-folders, or two class
            names differ only by case.
    """
    if not root.exists():
        raise DataError(f"{root}: no such folder; give a folder of images, or a set: emoji32, emoji64")
    if not root.is_dir():
        raise DataError(f"{root}: is a file; give the folder that contains the images")
    rejected: list[RejectedFile] = []
    found = sorted(walk_files(root, rejected))
    class_names = class_folders(root, found)
    label_of = {name: label for label, name in enumerate(class_names)}
    entries: list[IndexEntry] = []
    findings: dict[str, tuple[Stamp, IndexEntry | RejectedFile]] = {}
    decoded_files = 0
    for done, path in enumerate(found):
        # A file beside the class folders has no label; such a layout is refused when all of it is seen.
        label = label_of[path.split("/", 1)[0]] if class_names and "/" in path else -1
        stamp, now_ns = _stamp(root, path), time.time_ns()
        earlier = known.get(path) if known else None
        finding: IndexEntry | RejectedFile
        if earlier is not None and earlier[0] == stamp:
            finding = earlier[1]
            if isinstance(finding, IndexEntry) and finding.class_label != label:
                finding = replace(finding, class_label=label)
        else:
            decoded_files += 1
            try:
                finding, decoded = _look_at(root, path, label)
            except UnusableImageError as error:
                finding = RejectedFile(path, str(error), other=not should_be_image(root, path))
            else:
                if on_image:
                    on_image(len(entries), finding, decoded)
        if isinstance(finding, IndexEntry):
            entries.append(finding)
        else:
            rejected.append(finding)
        # Written a moment ago, it may be written again without another time on it.
        if stamp is not None and stamp.ctime_ns < now_ns - FRESH_NS:
            findings[path] = stamp, finding
        if progress:
            progress(done + 1, len(found))
    rejected.sort(key=lambda r: r.path)
    in_root = [e.path for e in entries if "/" not in e.path]
    if class_names and in_root:
        raise DataError(
            f"{root}: {len(in_root)} images lie beside the class folders, such as {in_root[0]!r}; "
            f"move each into the folder of its class"
        )
    return FolderIndex(root, class_names, tuple(entries), tuple(rejected), findings, decoded_files)


def walk_files(root: Path, rejected: list[RejectedFile]) -> Iterator[str]:
    """Paths of all regular files below `root`, in no order; what is passed over is added to `rejected`."""
    top = os.path.realpath(root)
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        here = os.path.join(root, folder)
        try:
            identity = os.stat(here)
            if (identity.st_dev, identity.st_ino) in seen:
                continue
            seen.add((identity.st_dev, identity.st_ino))
            children = list(os.scandir(here))
        except OSError as error:
            rejected.append(RejectedFile(folder or ".", f"folder cannot be read: {error.strerror}"))
            continue
        for child in children:
            path = f"{folder}/{child.name}" if folder else child.name
            if child.name.startswith("."):
                continue
            try:
                is_link = child.is_symlink()
                if is_link and os.path.commonpath([top, os.path.realpath(child.path)]) != top:
                    rejected.append(RejectedFile(path, "link that leads outside the folder; copy what it points to"))
                elif child.is_dir():
                    # The target lies inside and is found at its own place; entering it here would name its class
                    # after the link.
                    if is_link:
                        rejected.append(
                            RejectedFile(path, "link to a folder that is read at its own place", other=True)
                        )
                    else:
                        waiting.append(path)
                elif child.is_file():
                    yield path
                else:
                    reason = "link to nothing" if is_link else "neither a file nor a folder"
                    rejected.append(RejectedFile(path, reason))
            except OSError as error:
                rejected.append(RejectedFile(path, f"cannot be read: {error.strerror}"))


def class_folders(root: Path, found: Sequence[str]) -> tuple[str, ...]:
    """Sub-folders of `root`, if any of them holds a file that should be an image."""
    claimed = [path for path in found if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]
    if not any("/" in path for path in claimed or found):
        return ()
    names = sorted(c.name for c in os.scandir(root) if c.is_dir(follow_symlinks=False) and not c.name.startswith("."))
    refuse_case_twins(root, names)
    return tuple(names)


def refuse_case_twins(where: object, names: Iterable[str]) -> None:
    """Refuse classes that a disk which ignores case would merge: labels would shift from one machine to the next.

    Raises:
        DataError: two names differ only by case or accents.
    """
    spelled: dict[str, str] = {}
    for name in names:
        twin = spelled.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            raise DataError(f"{where}: class folders {twin!r} and {name!r} differ only by case or accents; rename one")


def should_be_image(root: Path, path: str) -> bool:
    """Whether its name or its first bytes promise an image."""
    if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
        return True
    try:
        with open(root / path, "rb") as f:
            return looks_like_image(f.read(16))
    except OSError:
        return True


def _stamp(root: Path, path: str) -> Stamp | None:
    try:
        status = os.stat(root / path)
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _look_at(root: Path, path: str, label: int) -> tuple[IndexEntry, Decoded]:
    data, size, mtime_ns = read_regular_file(root, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoded = decode(data)
    notes = decoded.notes + tuple(" ".join(str(w.message).split()) for w in caught)
    digest = hashlib.sha256(data).hexdigest()
    image_size = (decoded.image.height, decoded.image.width)
    return IndexEntry(path, size, mtime_ns, digest, decoded.format, decoded.mode, image_size, label, notes), decoded


def read_regular_file(root: Path, path: str) -> tuple[bytes, int, int]:
    """(content, size, mtime_ns); all three of the same open file.

    Raises:
        UnusableImageError: it cannot be read, is no regular file, or is larger than any image should be.
    """
    try:
        # O_NONBLOCK: a file that became a pipe must not stop the reader for ever.
        with open(
            os.open(os.path.join(root, path), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)),
            "rb",
        ) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnusableImageError("not a regular file")
            if status.st_size > _MAX_FILE_BYTES:
                raise UnusableImageError(f"{status.st_size} bytes; more than {_MAX_FILE_BYTES >> 20} MiB is refused")
            return f.read(), status.st_size, status.st_mtime_ns
    except OSError as error:
        raise UnusableImageError(f"cannot be read: {error.strerror}") from error
