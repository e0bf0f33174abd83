"""`.npz` files of images in ADM's layout: `arr_0` uint8 (N, H, W, 3), and `arr_1` int64 (N,) where there are labels.

This is what the evaluation suite of Dhariwal & Nichol 2021 (arXiv:2105.05233) reads and what papers exchange. Such a
file may be 10 GB, so neither side ever holds it: it is written from a stream and read in blocks.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

from smalti.data.npz_file import PIECE, ArrayHeader, Member, NpzFile, archive_of
from smalti.errors import DataError
from smalti.storage.filesystem import (
    FileRecord,
    FileSystem,
    LocalFileSystem,
    make_folders,
    require_space,
    storage_errors,
)
from smalti.storage.replacing import replace_file

IMAGES, LABELS = "arr_0", "arr_1"
LAYOUT = "ADM's layout is arr_0, uint8 (N, H, W, 3), RGB"


def write_images(
    path: Path,
    images: Iterable[np.ndarray],
    *,
    count: int,
    image_size: tuple[int, int],
    class_labels: Sequence[int] | np.ndarray | None = None,
    fs: FileSystem | None = None,
) -> FileRecord:
    """Write a stream of images as one `.npz` that `numpy.load` reads; the file appears whole or not at all.

    Not compressed, as `numpy.savez` leaves it, so that the images can be mapped into memory. The bytes depend on the
    images and labels alone.

    Args:
        images: uint8 (B, H, W, 3) RGB pieces, B as it comes; one piece at a time is held.
        count: images in all.
        image_size: rows and columns in pixels.
        class_labels: one for each image.

    Raises:
        DataError: an image of another type or size, more or fewer images or labels than `count`; no file is left.
        StorageError: the disk is full or refuses; what stood at `path` before is untouched.
    """
    fs = LocalFileSystem() if fs is None else fs
    labels = None if class_labels is None else _checked_labels(class_labels, count)
    needed = count * image_size[0] * image_size[1] * 3 + 8 * (0 if labels is None else count) + 1024
    advice = "What stood there before is untouched; make room or choose another place"
    with storage_errors(fs, path.parent, needed, f"writing {path.name}", advice):
        make_folders(fs, path.parent)
        require_space(fs, path.parent, needed, path.name)
        pieces = archive_of(_array_members(path, images, count, image_size, labels))
        return replace_file(fs, path, pieces)


def _checked_labels(class_labels: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    labels = np.asarray(class_labels)
    if labels.shape != (count,) or (count and labels.dtype.kind not in "iu"):
        raise DataError(
            f"expected {count} class labels, one whole number for each image, got {labels.dtype} {labels.shape}"
        )
    return labels.astype("<i8")


def _array_members(
    path: Path, images: Iterable[np.ndarray], count: int, image_size: tuple[int, int], labels: np.ndarray | None
) -> Iterator[Member]:
    yield IMAGES, (count, *image_size, 3), "|u1", _counted(path, images, count, image_size)
    if labels is not None:
        yield LABELS, (count,), "<i8", [labels]


def _counted(path: Path, images: Iterable[np.ndarray], count: int, image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The same pieces, each checked, and exactly `count` images in all."""
    seen = 0
    for piece in images:
        if piece.dtype != np.uint8 or piece.shape[1:] != (*image_size, 3):
            raise DataError(
                f"{path}: expected images as uint8 (B, {image_size[0]}, {image_size[1]}, 3), got {piece.dtype} "
                f"{piece.shape} at image {seen}; nothing was written"
            )
        seen += len(piece)
        if seen > count:
            break
        yield piece
    if seen != count:
        more = "more than that came" if seen > count else f"{seen} came"
        raise DataError(f"{path}: {count} images were announced, {more}; nothing was written")


@dataclass(frozen=True, eq=False)
class NpzImages:
    """The images of a `.npz`, read in blocks.

    Attributes:
        class_labels: int64 (N,) where the file has them.
        notes: what was left out.
    """

    file: NpzFile
    key: str
    header: ArrayHeader
    class_labels: np.ndarray | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.file.path)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.header.shape[1], self.header.shape[2]

    def __len__(self) -> int:
        return self.header.shape[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over number, size and pixels, whether they are compressed or not; reads all of them.

        Raises:
            DataError: the file is damaged.
        """
        digest = hashlib.sha256(f"images {self.header.shape} ".encode())
        for piece in self.file.stream(self.key):
            digest.update(piece)
        return digest.hexdigest()

    def blocks(self, indices: Sequence[int] | np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """uint8 (B, H, W, 3) of the images asked for, at most `rows` at a time, in the order asked for.

        Compressed files can only be read forwards: an order that runs back and forth decompresses the file from its
        start again and again.

        Raises:
            DataError: the file was damaged meanwhile.
        """
        return (self._stored if self.header.is_stored else self._deflated)(np.asarray(indices, dtype=np.int64), rows)

    def _stored(self, indices: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        # Read, not mapped: mapped pages count as memory of the process until the system wants them back.
        start, size = self.file.offset(self.key, self.header), math.prod(self.header.shape[1:])
        with contextlib.ExitStack() as stack:
            with self.file.readable():
                file = stack.enter_context(self.file.path.open("rb", buffering=0))
            for first in range(0, len(indices), rows):
                wanted = indices[first : first + rows]
                block = np.empty((len(wanted), *self.header.shape[1:]), dtype=np.uint8)
                runs = np.flatnonzero(np.diff(wanted) != 1) + 1
                for begin, end in pairwise([0, *runs.tolist(), len(wanted)]):
                    file.seek(start + int(wanted[begin]) * size)
                    self._fill(file, block[begin:end])
                yield block

    def _deflated(self, indices: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        size, position = math.prod(self.header.shape[1:]), 0
        with contextlib.ExitStack() as opened:
            member = opened.enter_context(self.file.opened(self.key, self.header))
            for first in range(0, len(indices), rows):
                wanted = indices[first : first + rows]
                block = np.empty((len(wanted), *self.header.shape[1:]), dtype=np.uint8)
                for place in np.argsort(wanted, kind="stable"):
                    if wanted[place] < position:
                        opened.close()
                        member, position = opened.enter_context(self.file.opened(self.key, self.header)), 0
                    self._skip(member, (int(wanted[place]) - position) * size)
                    self._fill(member, block[place])
                    position = int(wanted[place]) + 1
                yield block

    def _skip(self, member: IO[bytes], count: int) -> None:
        while count > 0:
            with self.file.readable():
                piece = member.read(min(count, PIECE))
            if not piece:
                raise DataError(f"{self.file.path} ends in the middle of an image; it was changed while it was read")
            count -= len(piece)

    def _fill(self, file: IO[bytes], block: np.ndarray) -> None:
        rest = block.reshape(-1).data
        while rest:
            with self.file.readable():
                count = file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise DataError(f"{self.file.path} ends in the middle of an image; it was changed while it was read")
            rest = rest[count:]


def open_npz_images(path: Path, key: str = IMAGES) -> NpzImages:
    """The images of a `.npz`; nothing but headers and labels is read yet.

    Raises:
        DataError: no such file or key, damage, or an array that is not in ADM's layout.
    """
    file = NpzFile(path)
    if key not in file.keys and is_statistics(file.keys):
        raise DataError(
            f"{path} holds statistics of images ({', '.join(sorted(file.keys))}) and no images; "
            "it can be a reference, not what is measured"
        )
    header = file.header(key)
    if problem := _not_images(header):
        raise DataError(f"{path}: {key} is {header}: {problem}; {LAYOUT}")
    labels, notes = _labels_of(file, header.shape[0]) if key == IMAGES else (None, ())
    return NpzImages(file, key, header, labels, notes)


def is_statistics(keys: Iterable[str]) -> bool:
    """Whether these keys of a `.npz` are those of reference statistics."""
    keys = set(keys)
    return {"mu", "sigma"} <= keys or {"mu_s", "sigma_s"} <= keys


def _not_images(header: ArrayHeader) -> str:
    """Why an array is not images in ADM's layout, and what to do; "" if it is."""
    shape = header.shape
    if len(shape) == 3 or (len(shape) == 4 and shape[3] != 3 and 1 in (shape[1], shape[3])):
        return "grey images; the networks are made for colour: repeat grey three times if that is meant"
    if len(shape) != 4:
        return f"an array of {len(shape)} dimensions holds no images"
    if shape[0] == 0 or 0 in shape[1:3]:
        return "there is no image in it"
    problems = []
    if header.dtype.kind == "f":
        problems.append("floats, whose range is unknown: scale them to 0 ... 255, round, and save them as uint8")
    elif header.dtype != np.uint8:
        problems.append("not 8 bits for each colour: save them as uint8")
    if shape[3] != 3 and shape[1] == 3:
        problems.append("channels come first: transpose to (N, H, W, 3)")
    elif shape[3] == 4:
        problems.append("four channels: put the images on a background and leave the alpha channel out")
    elif shape[3] != 3:
        problems.append("not three channels")
    if header.fortran_order:
        problems.append("Fortran order, in which no image lies in one piece: save numpy.ascontiguousarray of it")
    return "; ".join(problems)


def _labels_of(file: NpzFile, count: int) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if LABELS not in file.keys:
        return None, ()
    header = file.header(LABELS)
    if header.shape != (count,) or header.dtype.kind not in "iu":
        return None, (f"{LABELS} is {header}, no labels of {count} images; left out",)
    return file.read(LABELS, limit=header.bytes).astype(np.int64), ()
