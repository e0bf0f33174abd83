"""`open_images`: where images to be measured come from, as one kind of source that streams them.

A source is an image set, one side of its split, a folder, or an `.npz`; it never holds more than a few batches.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from smalti.config import did_you_mean
from smalti.data.decoding import centre_crop
from smalti.data.image_set import ImageSet
from smalti.data.npz import IMAGES, open_npz_images
from smalti.data.order import split
from smalti.data.originals import SAMPLES, cropped, is_sampled, open_originals, sample_names
from smalti.data.sets import BUILT_IN, load_image_set, rows_and_columns
from smalti.data.shard_place import is_shards
from smalti.data.shards import load_shards
from smalti.errors import ConfigError, DataError

SPLITS = ("train", "validation")
FRACTION, SEED = 0.125, 0  # what training sets aside unless told otherwise
_BLOCK = 64


class Reader(Protocol):
    """Images in a fixed order, read in blocks."""

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def blocks(self, indices: Sequence[int] | np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """uint8 (B, H, W, 3), at most `rows` at a time, in the order asked for."""


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images of one size in a fixed order, to be read as often as needed.

    Attributes:
        name: short, for people: of the set, the folder or the file, and the part of it.
        image_size: rows and columns in pixels.
        class_labels: int64 (N,), or None where there are no classes.
        notes: one line each on what to know before quoting a number of these images.
        real: known to be real images, because they are an image set or one side of the split that training makes.
    """

    name: str
    image_size: tuple[int, int]
    class_labels: np.ndarray | None
    notes: tuple[str, ...]
    _reader: Reader = field(repr=False)
    _chosen: np.ndarray | None = field(default=None, repr=False)  # places in the reader; None = all of them
    real: bool = False

    @property
    def count(self) -> int:
        """Images in all."""
        return len(self._reader if self._chosen is None else self._chosen)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex that identifies the images and their order; the first call may read a whole file.

        Raises:
            DataError: the file is damaged.
        """
        whole, size = self._reader.fingerprint, self.image_size
        if self._chosen is None and size == self._reader.image_size:
            return whole
        chosen = None if self._chosen is None else self._chosen.tolist()
        return hashlib.sha256(json.dumps([whole, list(size), chosen]).encode()).hexdigest()

    def batches(
        self, rows: int = _BLOCK, indices: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[UInt8[Tensor, "B 3 H W"]]:
        """The images, or those with the given places, in order, at most `rows` at a time.

        Raises:
            ConfigError: `rows` is below 1, or there is no image of one of the places.
            DataError: a file was changed or damaged meanwhile.
        """
        places = np.arange(self.count) if indices is None else np.asarray(indices, dtype=np.int64)
        if rows < 1:
            raise ConfigError(f"batches of {rows} images: give at least 1")
        wrong = places[(places < 0) | (places >= self.count)]
        if len(wrong):
            raise ConfigError(f"{self.name} has images 0 to {self.count - 1}, {int(wrong[0])} was asked for")
        return self._batches(places if self._chosen is None else self._chosen[places], rows)

    def _batches(self, places: np.ndarray, rows: int) -> Iterator[Tensor]:
        for block in self._reader.blocks(places, rows):
            if block.shape[1:3] != self.image_size:
                block = np.stack([np.asarray(centre_crop(Image.fromarray(image), self.image_size)) for image in block])
            yield torch.from_numpy(np.ascontiguousarray(block.transpose(0, 3, 1, 2)))


def open_images(
    spec: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    convert: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSource:
    """Open images to be measured; nothing is decoded yet.

    Args:
        spec: `emoji32`, `emoji64`, a packed set, a folder of images (below it too), a folder that `smalti sample`
            wrote, tar shards, or an `.npz` in ADM's layout. Sets, folders and shards may be followed by `#train` or
            `#validation`, the sides of the split that training makes, and by `(seed=3,fraction=0.25)` where training
            was told so (or `,seed=3,fraction=0.25`, for which a shell needs no quotes). An `.npz` may be followed by
            `#KEY`, where its images are not called arr_0.
        image_size: side, or (rows, columns), in pixels, to scale and crop to as ADM does; None = as they are.
        convert: accept files that are not 8-bit RGB and convert them.
        progress: called with (files done, files found) while a folder is looked at.

    Raises:
        ConfigError: the part behind `#` or the image size makes no sense.
        DataError: there is nothing of that name, no image in it, or images that cannot be measured as they are.
    """
    name = str(spec)
    size = rows_and_columns(image_size)
    path, _, part = (name, "", "") if "#" not in name or Path(name).exists() else name.rpartition("#")
    if path not in BUILT_IN and is_shards(path):
        source = _open_shards(name, path, part, size, convert, progress)
    elif path not in BUILT_IN and Path(path).is_file():
        source = _open_file(Path(path), part)
    else:
        source = _open_set(name, path, part, size, convert, progress)
    if size is None or size == source.image_size:
        return source
    notes = (*source.notes, cropped(source.count, source.count, size))
    return ImageSource(source.name, size, source.class_labels, notes, source._reader, source._chosen, source.real)


def _open_file(path: Path, key: str, *, name: str = "") -> ImageSource:
    if path.suffix != ".npz":
        raise DataError(f"{path} is a file; images are read from a folder, an image set, or an .npz in ADM's layout")
    images = open_npz_images(path, key or IMAGES)
    name = name or path.name + (f"#{key}" if key else "")
    return ImageSource(name, images.image_size, images.class_labels, images.notes, images)


def _open_set(
    name: str,
    path: str,
    part: str,
    size: tuple[int, int] | None,
    convert: bool,
    progress: Callable[[int, int], None] | None,
) -> ImageSource:
    folder = Path(path)
    is_set = path in BUILT_IN or (folder / "items.json").is_file()
    if not is_set and not folder.is_dir():
        close = did_you_mean(path, BUILT_IN)
        hint = close if "did you mean" in close else ""
        raise DataError(
            f"{path!r} is neither an image set ({', '.join(BUILT_IN)}), nor an existing folder or .npz{hint}"
        )
    wanted = _Split.parse(part, name) if part else None
    notes: tuple[str, ...] = ()
    images: ImageSet
    reader: Reader
    if is_set:
        images = load_image_set(path)
        reader = _SetReader(images)
    else:
        if is_sampled(folder) and wanted:
            raise DataError(f"{path} holds samples, which have no split; leave out #{part}")
        if is_sampled(folder) and (folder / SAMPLES).is_file() and not sample_names(folder):
            return _open_file(folder / SAMPLES, "", name=folder.resolve().name)
        images = reader = originals = open_originals(folder, size, convert=convert, progress=progress)
        notes = originals.notes
    return _part_of(images, reader, name, wanted, notes, real=is_set)


def _part_of(
    images: ImageSet, reader: Reader, name: str, wanted: "_Split | None", notes: tuple[str, ...], *, real: bool
) -> ImageSource:
    """All images of a set, or one side of its split."""
    labels = images.class_labels if images.class_names else None
    if wanted is None:
        return ImageSource(images.name, images.image_size, labels, notes, reader, real=real)
    sides = split(images, wanted.fraction, wanted.seed, allow_empty=True)
    chosen = sides.train if wanted.side == "train" else sides.validation
    if not len(chosen):
        raise DataError(f"{name} holds no image: a fraction of {wanted.fraction} sets none aside")
    if labels is not None:
        labels = labels[chosen]
    return ImageSource(
        f"{images.name}#{name.rpartition('#')[2]}", images.image_size, labels, notes, reader, chosen, real=True
    )


def _open_shards(
    name: str,
    path: str,
    part: str,
    size: tuple[int, int] | None,
    convert: bool,
    progress: Callable[[int, int], None] | None,
) -> ImageSource:
    wanted = _Split.parse(part, name) if part else None
    images = load_shards(path, size, allow_empty=True, progress=progress)
    count, odd = len(images), Counter[str]()
    for shard in images.shards:
        odd.update({kind: number for kind, number in shard.kinds if not kind.endswith(" RGB")})
    if odd and not convert:
        raise DataError(
            f"{path}: {odd.total()} of {count} images are not plain 8-bit RGB: "
            f"{', '.join(f'{number} {kind}' for kind, number in odd.items())}; converting them changes the number: "
            f"convert them yourself, or allow it with --convert"
        )
    notes = []
    if odd:
        notes.append(f"{odd.total()} of {count} images were converted to 8-bit RGB, what is transparent on white")
    if changed := sum(int((shard.image_size != images.image_size).any(axis=1).sum()) for shard in images.shards):
        notes.append(cropped(changed, count, images.image_size))
    return _part_of(images, _SetReader(images), name, wanted, tuple(notes), real=False)


@dataclass(frozen=True)
class _Split:
    """One side of a split, as `validation(seed=3,fraction=0.25)` names it."""

    side: str
    fraction: float = FRACTION
    seed: int = SEED

    @staticmethod
    def parse(text: str, where: str) -> "_Split":
        spelled = text[:-1].replace("(", ",", 1) if text.endswith(")") else text
        side, *settings = spelled.split(",")
        if side not in SPLITS:
            raise ConfigError(f"{where}: there is no part {side!r}; use #train or #validation")
        given = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            try:
                given[name] = {"fraction": float, "seed": int}[name](value)
            except (KeyError, ValueError):
                raise ConfigError(
                    f"{where}: {setting!r} is no setting of a split; write seed=NUMBER or fraction=NUMBER"
                ) from None
        return _Split(side, given.get("fraction", FRACTION), int(given.get("seed", SEED)))


@dataclass(frozen=True, eq=False)
class _SetReader:
    """An image set read in blocks."""

    images: ImageSet

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.image_size

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def blocks(self, indices: Sequence[int] | np.ndarray, rows: int) -> Iterator[np.ndarray]:
        for first in range(0, len(indices), rows):
            yield np.stack([self.images.read(int(index)) for index in indices[first : first + rows]])
