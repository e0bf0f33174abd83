"""A folder of images as an image set: one checked pass builds an index, and everything after reads only the index."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smalti.data.changed import ChangedFileError, Tally
from smalti.data.decoding import Decoded, UnusableImageError, centre_crop, decode
from smalti.data.folder_index import read_known, write_known
from smalti.data.folder_pass import FolderIndex, IndexEntry, RejectedFile, index_folder, read_regular_file
from smalti.data.image_set import fingerprint_of, merge_twins
from smalti.errors import DataError, StorageError
from smalti.world import World

__all__ = ["ChangedFileError", "FolderImages", "index_folder", "load_folder"]

CACHE_BYTES = 1 << 30
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class FolderImages:
    """An `ImageSet` of files. Below `CACHE_BYTES` its pixels are held in memory and the files are not read again.

    Attributes:
        index: the pass that this set was made from.
        cache: uint8 (H, W, 3) of each image, or `None` when the set is too large or was not decoded.
        kept: what was read since, of a set that is small enough and was not decoded; else `None`.
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
    kept: dict[int, np.ndarray] | None = field(default=None, repr=False)
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
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        entry = self.index.entries[index]
        self._tally.count_read()
        try:
            data, size, mtime_ns = read_regular_file(self.index.root, entry.path)
            if (size, mtime_ns) != (entry.size, entry.mtime_ns):
                raise UnusableImageError("changed since it was checked")
            pixels = np.asarray(centre_crop(decode(data).image, self.image_size))
        except UnusableImageError as error:
            raise self._tally.failure(f"{self.index.root}: {entry.path!r}: {error}") from error
        if self.kept is not None:
            self.kept[index] = pixels
        return pixels


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

    Where `smalti data check` stored an index of it, only files that changed since are opened.

    Args:
        cache_bytes: sets of at most this many bytes of pixels are held in memory.
    """
    pixels = _PixelCache(image_size, cache_bytes)
    known = read_known(root)
    index = index_folder(root, known=known, on_image=None if known else pixels.add, progress=progress)
    if known and (index.decoded or len(index.known) != len(known)):
        with contextlib.suppress(StorageError):  # kept or not, the set is the same; the next start takes longer
            write_known(root, index)
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
        cache=None if known else pixels.images(),
        kept={} if known and len(names) * size[0] * size[1] * 3 <= cache_bytes else None,
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
    """Refuse a set some of whose files cannot be used, or say in one line that they are left out.

    Raises:
        DataError: there are such files, and they must not be left out or nothing else is there.
    """
    if not bad:
        return
    if skip_unreadable and usable:
        if World.launched().rank == 0:
            logging.getLogger("smalti").warning(
                "%s: %d of %d files cannot be used and are left out (%r: %s); `smalti data check %s` lists them",
                where, len(bad), len(bad) + usable, bad[0].path, bad[0].reason, where,
            )  # fmt: skip
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
        if (index.root / "latents.json").exists():
            raise DataError(f"{index.root} holds latents, made by `smalti encode` already; give a folder of images")
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
