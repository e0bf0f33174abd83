"""`.npz` files of images in ADM's layout: `arr_0` uint8 (N, H, W, 3), and `arr_1` int64 (N,) where there are labels.

This is what the evaluation suite of Dhariwal & Nichol 2021 (arXiv:2105.05233) reads and what papers exchange. Such a
file may be 10 GB, so neither side ever holds it: it is written from a stream and read in blocks.
"""

import contextlib
import io
import os
import platform
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smalti.errors import DataError
from smalti.storage.filesystem import (
    Buffer,
    FileRecord,
    FileSystem,
    LocalFileSystem,
    make_folders,
    require_space,
    storage_errors,
    write_file,
)

LAYOUT = "arr_0 as uint8 (N, H, W, 3), RGB, and optionally arr_1, the labels, as int64 (N,)"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip archive can name: equal images, equal bytes


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
        pieces = _archive(_array_members(path, images, count, image_size, labels))
        return replace_file(fs, path, pieces)


def replace_file(fs: FileSystem, path: Path, pieces: Iterable[Buffer]) -> FileRecord:
    """Write beside `path` under another name, sync, and put it in the place of `path`. On an error nothing is left.

    The name carries host and process, so that two writers never meet in one file; what a killed process left is
    removed by the next one on the same host.
    """
    for stale in _stale(path):
        with contextlib.suppress(FileNotFoundError):  # another process cleans up too
            fs.remove_file(stale)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        record = write_file(fs, temporary, pieces)
        fs.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            fs.remove_file(temporary)
        raise
    fs.sync_folder(path.parent)
    return record


def _stale(path: Path) -> Iterator[Path]:
    prefix, suffix = f".{path.name}.{platform.node()}-", ".tmp"
    for name in os.listdir(path.parent):
        process = name[len(prefix) : -len(suffix)]
        is_ours = name.startswith(prefix) and name.endswith(suffix) and process.isdecimal()
        if is_ours and (int(process) == os.getpid() or not _is_alive(int(process))):
            yield path.with_name(name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to somebody else
        return True
    return True


def _checked_labels(class_labels: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    labels = np.asarray(class_labels)
    if labels.shape != (count,) or (count and labels.dtype.kind not in "iu"):
        raise DataError(
            f"expected {count} class labels, one whole number for each image, got {labels.dtype} {labels.shape}"
        )
    return labels.astype("<i8")


Member = tuple[str, tuple[int, ...], str, Iterable[np.ndarray]]


def _array_members(
    path: Path, images: Iterable[np.ndarray], count: int, image_size: tuple[int, int], labels: np.ndarray | None
) -> Iterator[Member]:
    yield "arr_0", (count, *image_size, 3), "|u1", _counted(path, images, count, image_size)
    if labels is not None:
        yield "arr_1", (count,), "<i8", [labels]


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


def _archive(members: Iterable[Member]) -> Iterator[Buffer]:
    """The bytes of an uncompressed zip archive of arrays, piece by piece."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name, shape, dtype, pieces in members:
            info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            info.create_system = 3
            # zip64 for every member, as numpy does: whether one is needed must not change the layout.
            with archive.open(info, "w", force_zip64=True) as member:
                header = io.BytesIO()
                np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
                member.write(header.getvalue())
                for piece in pieces:
                    if piece.size:
                        member.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                    yield from sink.taken()
    yield from sink.taken()


class _Sink:
    """What `zipfile` takes for a stream that cannot seek; hands on what was written without a copy."""

    def __init__(self) -> None:
        self._waiting: list[Buffer] = []

    def write(self, data: Any) -> int:
        self._waiting.append(data)
        return len(data)

    def flush(self) -> None: ...

    def taken(self) -> list[Buffer]:
        taken, self._waiting = self._waiting, []
        return taken
