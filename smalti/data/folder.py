"""A folder of images as an image set: one checked pass builds an index, and everything after reads only the index.

Layout: either all images lie directly in the folder (no classes), or each lies somewhere below one sub-folder of it,
whose name is its class. The pass opens and decodes every file, because most damage shows only then.
"""

import hashlib
import os
import stat
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smalti.data.changed import ChangedFileError, Tally
from smalti.data.decoding import Decoded, UnusableImageError, centre_crop, decode, looks_like_image
from smalti.data.image_set import fingerprint_of, merge_twins
from smalti.errors import DataError

__all__ = ["ChangedFileError", "FolderImages", "index_folder", "load_folder"]

CACHE_BYTES = 1 << 30
_MAX_FILE_BYTES = 1 << 29
# What promises to be an image, whether it can be decoded here or not. Other files count only if they start like one.
IMAGE_SUFFIXES = frozenset(
    """.jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .avif .heic .heif .jp2 .jxl .ico .psd .tga .eps
    .svg .ppm .pgm .exr .hdr""".split()  # noqa: SIM905 (a list literal is one per line)
)
_SHOWN = 5


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


@dataclass(frozen=True)
class FolderIndex:
    """All that one pass over a folder found, in order of path."""

    root: Path
    class_names: tuple[str, ...]
    entries: tuple[IndexEntry, ...]
    rejected: tuple[RejectedFile, ...]

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
    root: Path, *, on_image: OnImage | None = None, progress: Callable[[int, int], None] | None = None
) -> FolderIndex:
    """Look at every file below `root` once.

    Links that lead outside `root` are not followed, and no folder is entered twice. Names that start with a dot are
    skipped.

    Args:
        on_image: called with the position in the index, the entry and the decoded image of each usable file.
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
    entries: list[IndexEntry] = []
    for done, path in enumerate(found):
        try:
            entry, decoded = _look_at(root, path, class_names)
        except UnusableImageError as error:
            rejected.append(RejectedFile(path, str(error), other=not should_be_image(root, path)))
        else:
            if on_image:
                on_image(len(entries), entry, decoded)
            entries.append(entry)
        if progress:
            progress(done + 1, len(found))
    rejected.sort(key=lambda r: r.path)
    in_root = [e.path for e in entries if "/" not in e.path]
    if class_names and in_root:
        raise DataError(
            f"{root}: {len(in_root)} images lie beside the class folders, such as {in_root[0]!r}; "
            f"move each into the folder of its class"
        )
    return FolderIndex(root, class_names, tuple(entries), tuple(rejected))


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


def _look_at(root: Path, path: str, class_names: Sequence[str]) -> tuple[IndexEntry, Decoded]:
    data, size, mtime_ns = read_regular_file(root, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoded = decode(data)
    notes = decoded.notes + tuple(" ".join(str(w.message).split()) for w in caught)
    # A file beside the class folders has no label; `index_folder` refuses such a layout when it has seen all of it.
    label = class_names.index(path.split("/", 1)[0]) if class_names and "/" in path else -1
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


@dataclass(frozen=True, eq=False)
class FolderImages:
    """An `ImageSet` of files. Below `CACHE_BYTES` its pixels are held in memory and the files are not read again.

    Attributes:
        index: the pass that this set was made from.
        cache: uint8 (H, W, 3) of each image, or `None` when the set is too large.
    """

    name: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    class_labels: np.ndarray
    item_names: tuple[str, ...]
    split_names: tuple[str, ...]
    fingerprint: str
    index: FolderIndex
    cache: tuple[np.ndarray, ...] | None
    _tally: Tally = field(default_factory=Tally, repr=False)

    def __len__(self) -> int:
        return len(self.item_names)

    def read(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3) RGB of one image.

        Raises:
            ChangedFileError: the file was changed or removed after the pass.
            DataError: this happened to more than 0.1 % of all reads, and more than once.
        """
        if self.cache is not None:
            return self.cache[index]
        entry = self.index.entries[index]
        self._tally.count_read()
        try:
            data, size, mtime_ns = read_regular_file(self.index.root, entry.path)
            if (size, mtime_ns) != (entry.size, entry.mtime_ns):
                raise UnusableImageError("changed since it was checked")
            return np.asarray(centre_crop(decode(data).image, self.image_size))
        except UnusableImageError as error:
            raise self._tally.failure(f"{self.index.root}: {entry.path!r}: {error}") from error


def load_folder(
    root: Path,
    image_size: tuple[int, int] | None,
    *,
    allow_empty: bool = False,
    skip_unreadable: bool = False,
    cache_bytes: int = CACHE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> FolderImages:
    """Check a folder of images and make a set of them; see `load_image_set` for the arguments.

    Args:
        cache_bytes: sets of at most this many bytes of pixels are held in memory.
    """
    pixels = _PixelCache(image_size, cache_bytes)
    index = index_folder(root, on_image=pixels.add, progress=progress)
    refuse_unusable(index.root, index.unusable, len(index.entries), skip_unreadable)
    _refuse_empty(index, allow_empty)
    size = image_size or _common_size(index)
    names = tuple(e.path for e in index.entries)
    digests = [e.sha256 for e in index.entries]
    stems = [os.path.splitext(name)[0] for name in names]
    return FolderImages(
        name=root.resolve().name or str(root),
        image_size=size,
        class_names=index.class_names,
        class_labels=index.class_labels,
        item_names=names,
        split_names=tuple(merge_twins(stems, digests)),
        fingerprint=fingerprint_of(names, index.class_labels, digests, size),
        index=index,
        cache=pixels.images(),
    )


class _PixelCache:
    """Collects cropped images during the pass, and gives up when they would exceed the limit."""

    def __init__(self, image_size: tuple[int, int] | None, limit: int) -> None:
        self._image_size, self._limit = image_size, limit
        self._images: list[np.ndarray] = []
        self._bytes, self._complete = 0, True

    def add(self, position: int, entry: IndexEntry, decoded: Decoded) -> None:
        if not self._complete:
            return
        size = self._image_size or entry.image_size
        self._bytes += size[0] * size[1] * 3
        # Images of several sizes cannot make an array; without a wanted size the set is refused after the pass.
        if self._bytes > self._limit or (self._images and self._images[0].shape[:2] != size):
            self._images, self._complete = [], False
            return
        self._images.append(np.asarray(centre_crop(decoded.image, size)))

    def images(self) -> tuple[np.ndarray, ...] | None:
        return tuple(self._images) if self._complete else None


def refuse_unusable(where: object, bad: Sequence[RejectedFile], usable: int, skip_unreadable: bool) -> None:
    """Refuse a set some of whose files cannot be used.

    Raises:
        DataError: there are such files, and they must not be left out or nothing else is there.
    """
    if not bad or (skip_unreadable and usable):
        return
    advice = "repair or remove them, or leave them out with skip_unreadable"
    head = f"{where}: {len(bad)} of {len(bad) + usable} files cannot be used"
    if len(bad) == 1:
        raise DataError(f"{head} ({bad[0].path!r}: {bad[0].reason}); {advice.replace('them', 'it')}")
    lines = [f"  {r.path!r}: {r.reason}" for r in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more; `smalti data check {where}` lists them all")
    raise DataError("\n".join([f"{head}; {advice}:", *lines]))


def _refuse_empty(index: FolderIndex, allow_empty: bool) -> None:
    if not index.entries:
        others = f" ({len(index.rejected)} other files)" if index.rejected else ""
        raise DataError(f"{index.root}: no image in this folder{others}; give a folder of images")
    present = {e.class_label for e in index.entries}
    empty = [name for label, name in enumerate(index.class_names) if label not in present]
    if empty and not allow_empty:
        shown = ", ".join(map(repr, empty[:_SHOWN])) + (
            f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        )
        raise DataError(f"{index.root}: no image in class folder {shown}; fill or remove it, or set allow_empty")


def _common_size(index: FolderIndex) -> tuple[int, int]:
    sizes = sorted({e.image_size for e in index.entries})
    if len(sizes) > 1:
        raise DataError(
            f"{index.root}: the images have {len(sizes)} different sizes, from {sizes[0]} to {sizes[-1]} (rows, "
            f"columns); set image_size"
        )
    return sizes[0]
