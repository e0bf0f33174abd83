"""A folder of images that are to be measured: as they are, or refused, because every silent change changes the number.

Training may scale, crop and convert; see `smalti.data.folder`. Here one pass reads and hashes the files and looks at
their heads; they are decoded when they are asked for, by several threads, and never held.
"""

import hashlib
import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from smalti.data.decoding import FORMATS, MAX_PIXELS, UnusableImageError, centre_crop, decode
from smalti.data.folder_pass import RejectedFile, class_folders, read_regular_file, should_be_image, walk_files
from smalti.data.image_set import fingerprint_of, merge_twins
from smalti.errors import DataError

SAMPLES = "samples.npz"  # what `smalti sample` writes in the place of PNGs, or beside them
_RECORDS = ("sample.json", "sample.yaml")
_SAMPLE = re.compile(r"([0-9]+)\.png")
_ORIENTATION = 0x0112  # of EXIF; 5 to 8 lay the image on its side
_PNG_END = b"IEND"
_AHEAD_BYTES = 1 << 28
_TASK = 16  # files that a thread decodes at once: one alone is too little work to hand over


@dataclass(frozen=True)
class Head:
    """What one file is, before its pixels are decoded.

    Attributes:
        path: below the root.
        image_size: rows and columns, upright.
        oddity: what must be converted to become 8-bit RGB, or "".
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    format: str
    image_size: tuple[int, int]
    oddity: str


@dataclass(frozen=True, eq=False)
class Originals:
    """An `ImageSet` of files of one size, or cropped to one size.

    Attributes:
        heads: one for each image, in order.
        notes: what to know about these images before quoting a number.
    """

    root: Path
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    class_labels: np.ndarray
    heads: tuple[Head, ...]
    notes: tuple[str, ...]
    threads: int

    @property
    def name(self) -> str:
        return self.root.resolve().name or str(self.root)

    @property
    def item_names(self) -> tuple[str, ...]:
        return tuple(head.path for head in self.heads)

    @property
    def split_names(self) -> tuple[str, ...]:
        stems = [os.path.splitext(head.path)[0] for head in self.heads]
        return tuple(merge_twins(stems, [head.sha256 for head in self.heads]))

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the contents of the files in their order, and the image size."""
        return fingerprint_of((), np.zeros(0, np.int64), (head.sha256 for head in self.heads), self.image_size)

    def __len__(self) -> int:
        return len(self.heads)

    def read(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3) of one image.

        Raises:
            DataError: the file is damaged, or was changed since the folder was opened.
        """
        head = self.heads[index]
        try:
            data, size, mtime_ns = read_regular_file(self.root, head.path)
            if (size, mtime_ns) != (head.size, head.mtime_ns):
                raise UnusableImageError("changed while it was measured")
            image = decode(data).image
            if (image.height, image.width) != head.image_size:
                raise UnusableImageError(
                    f"{image.height} x {image.width} pixels, where its head says {head.image_size}"
                )
        except UnusableImageError as error:
            raise DataError(f"{self.root}: {head.path!r}: {error}; restore or remove it, and measure again") from error
        return np.asarray(image if head.image_size == self.image_size else centre_crop(image, self.image_size))

    def blocks(self, indices: Sequence[int] | np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """uint8 (B, H, W, 3) of the images asked for, at most `rows` at a time, in the order asked for.

        Threads decode a few blocks ahead; memory does not grow with the number of images.

        Raises:
            DataError: see `read`.
        """
        # Enough work for every thread while a block is used, as far as memory allows.
        block_bytes = min(rows, max(1, len(indices))) * self.image_size[0] * self.image_size[1] * 3
        ahead = max(1, min(1 + -(-2 * self.threads * _TASK // rows), _AHEAD_BYTES // block_bytes))
        waiting: deque[tuple[np.ndarray, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="smalti-decode")
        try:
            for first in range(0, len(indices), rows):
                wanted = [int(index) for index in indices[first : first + rows]]
                block = np.empty((len(wanted), *self.image_size, 3), dtype=np.uint8)
                tasks = [
                    pool.submit(self._fill, wanted[i : i + _TASK], block[i : i + _TASK])
                    for i in range(0, len(wanted), _TASK)
                ]
                waiting.append((block, tasks))
                if len(waiting) > ahead:
                    yield _done(waiting.popleft())
            while waiting:
                yield _done(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _fill(self, indices: Sequence[int], out: np.ndarray) -> None:
        for row, index in enumerate(indices):
            out[row] = self.read(index)


def _done(decoded: tuple[np.ndarray, list[Future[None]]]) -> np.ndarray:
    block, tasks = decoded
    for task in tasks:
        task.result()
    return block


def open_originals(
    root: Path,
    image_size: tuple[int, int] | None = None,
    *,
    convert: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Originals:
    """Look at the head of every image file in a folder and below it.

    A folder that `smalti sample` wrote gives its images in the order of their seeds, without the overview `grid.png`.

    Args:
        image_size: rows and columns to scale and crop to, as ADM does; None = the images must all have one size.
        convert: accept grey, CMYK, palette, transparent, animated and 16-bit files, and make them 8-bit RGB.
        threads: for decoding; None = one for each core, at most 8.
        progress: called with (files done, files found).

    Raises:
        DataError: no image, files that cannot be read, that are not 8-bit RGB, or images of several sizes.
    """
    threads = threads or min(8, os.cpu_count() or 1)
    sampled = is_sampled(root)
    rejected: list[RejectedFile] = []
    found = sample_names(root) if sampled else sorted(walk_files(root, rejected))
    heads: list[Head] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="smalti-look") as pool:
        for done, head in enumerate(pool.map(lambda path: _look_at(root, path), found)):
            if isinstance(head, Head):
                heads.append(head)
            else:
                rejected.append(head)
            if progress:
                progress(done + 1, len(found))
    _refuse_unreadable(root, rejected, len(heads))
    if not heads:
        others = f" ({len(rejected)} other files)" if rejected else ""
        raise DataError(f"{root}: no image in this folder{others}; give a folder that holds some")
    _refuse_odd(root, heads, convert)
    size = image_size or _one_size(root, heads)
    names = () if sampled else class_folders(root, [head.path for head in heads])
    if any("/" not in head.path for head in heads):
        names = ()
    label_of = {name: label for label, name in enumerate(names)}
    labels = [label_of[head.path.split("/", 1)[0]] for head in heads] if names else []
    return Originals(
        root=root,
        image_size=size,
        class_names=names,
        class_labels=np.asarray(labels, dtype=np.int64),
        heads=tuple(heads),
        notes=tuple(_notes(heads, size)),
        threads=threads,
    )


def is_sampled(folder: Path) -> bool:
    """Whether `smalti sample` wrote this folder."""
    return any((folder / record).is_file() for record in _RECORDS)


def sample_names(root: Path) -> list[str]:
    """Names of the images that `smalti sample` wrote as SEED.png, by seed.

    Raises:
        DataError: two files are of one seed.
    """
    by_seed: dict[int, str] = {}
    for name in sorted(os.listdir(root)):
        if match := _SAMPLE.fullmatch(name):
            twin = by_seed.setdefault(int(match[1]), name)
            if twin != name:
                raise DataError(f"{root}: {twin} and {name} are of one seed; remove the one that is not of this set")
    return [by_seed[seed] for seed in sorted(by_seed)]


def _look_at(root: Path, path: str) -> Head | RejectedFile:
    try:
        data, size, mtime_ns = read_regular_file(root, path)
        if not data:
            raise UnusableImageError("empty file (0 bytes)")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise UnusableImageError(f"more than {MAX_PIXELS // 1_000_000} million pixels")
                image_size = opened.size if _lies_on_its_side(opened) else opened.size[::-1]
                oddity, format_name = _oddity(opened), str(opened.format)
            # Half a file has a whole head; its pixels would be asked for after hours of measuring others.
            if format_name == "PNG" and data.rfind(_PNG_END) < 0:
                raise UnusableImageError("cut off: the end of the PNG is missing")
        except UnusableImageError:
            raise
        except Exception as error:  # a decoder fed with damaged bytes may raise anything; none of it is our state
            raise UnusableImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except UnusableImageError as error:
        return RejectedFile(path, str(error), other=not should_be_image(root, path))
    return Head(path, size, mtime_ns, hashlib.sha256(data).hexdigest(), format_name, image_size, oddity)


def _lies_on_its_side(opened: Image.Image) -> bool:
    # Asking a PNG for its EXIF data decodes all of it, unless they stand at its head.
    known = opened.format != "PNG" or "exif" in opened.info
    return known and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)


def _oddity(opened: Image.Image) -> str:
    """What keeps an image from being plain 8-bit RGB."""
    mode = opened.mode
    # Pillow calls 16-bit colour "RGB" and drops the lower byte; only the name of the raw data tells.
    if (
        mode.startswith("I;16")
        or mode in ("I", "F")
        or any(";16" in str(tile[3]) for tile in getattr(opened, "tile", ()))
    ):
        return "with more than 8 bits"
    if mode in ("1", "L", "LA", "La"):
        return "grey"
    if mode in ("P", "PA"):
        return "with a palette"
    if opened.has_transparency_data:
        return "with transparency"
    if mode != "RGB":
        return mode
    return "animated" if getattr(opened, "is_animated", False) else ""


def _refuse_unreadable(root: Path, rejected: Iterable[RejectedFile], usable: int) -> None:
    bad = [file for file in rejected if not file.other]
    if bad:
        raise DataError(
            f"{root}: {len(bad)} of {len(bad) + usable} files cannot be read, such as {bad[0].path!r}: "
            f"{bad[0].reason}; restore or remove them"
        )


def _refuse_odd(root: Path, heads: Sequence[Head], convert: bool) -> None:
    odd: dict[str, list[Head]] = {}
    for head in heads:
        if head.oddity:
            odd.setdefault(head.oddity, []).append(head)
    if odd and not convert:
        count = sum(map(len, odd.values()))
        kinds = ", ".join(f"{len(found)} {kind} ({found[0].path!r})" for kind, found in odd.items())
        raise DataError(
            f"{root}: {count} of {len(heads)} images are not plain 8-bit RGB: {kinds}; converting them changes the "
            "number: convert them yourself, or allow it with --convert"
        )


def _one_size(root: Path, heads: Sequence[Head]) -> tuple[int, int]:
    sizes = {head.image_size for head in heads}
    if len(sizes) > 1:
        other = next(head for head in heads if head.image_size != heads[0].image_size)
        shown = " and ".join(f"{h.path!r} {h.image_size[0]} x {h.image_size[1]}" for h in (heads[0], other))
        raise DataError(
            f"{root}: images of {len(sizes)} sizes, such as {shown} (rows x columns); give --image-size to scale and "
            "crop all of them"
        )
    return heads[0].image_size


def _notes(heads: Sequence[Head], image_size: tuple[int, int]) -> Iterator[str]:
    compressed = sum(head.format == "JPEG" for head in heads)
    if compressed:
        yield (
            f"{compressed} of {len(heads)} images are JPEG: JPEG compression changes FID "
            "(Parmar et al. 2022, arXiv:2104.11222)"
        )
    if odd := sum(bool(head.oddity) for head in heads):
        yield f"{odd} of {len(heads)} images were converted to 8-bit RGB, what is transparent on white"
    if changed := sum(head.image_size != image_size for head in heads):
        yield cropped(changed, len(heads), image_size)


def cropped(changed: int, count: int, image_size: tuple[int, int]) -> str:
    """The note on images that were brought to another size."""
    return (
        f"{changed} of {count} images were scaled and centre-cropped to {image_size[0]} x {image_size[1]} pixels, "
        "as ADM prepares images"
    )
