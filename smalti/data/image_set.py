"""What every set of examples knows of itself, what an image set can do, and the kind that is one array of pixels."""

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Catalogue(Protocol):
    """Examples in a fixed order, with their classes and names: all that splits and sample orders look at."""

    @property
    def name(self) -> str:
        """What the user called it: `emoji32`, or the folder's own name."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class label; empty when the set has no classes."""

    @property
    def class_labels(self) -> np.ndarray:
        """int64 (N,), positions in `class_names`; of length 0 when the set has no classes."""

    @property
    def item_names(self) -> Sequence[str]:
        """One name per image, for people."""

    @property
    def split_names(self) -> Sequence[str]:
        """One name per image; images that share it (skin tones, styles, twins) always stay together in a split."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over names, labels, sizes and contents; equal for equal data on any machine."""

    def __len__(self) -> int:
        """Number of examples."""


@runtime_checkable
class ImageSet(Catalogue, Protocol):
    """A catalogue of images of one size."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns in pixels."""

    def read(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3) RGB of one image; not to be written to.

        Raises:
            ChangedFileError: the image is a file that was changed after the set was loaded.
        """


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """An `ImageSet` whose pixels are one array, in memory or mapped from a file."""

    name: str
    class_names: tuple[str, ...]
    class_labels: np.ndarray
    item_names: tuple[str, ...]
    split_names: tuple[str, ...]
    fingerprint: str
    images: np.ndarray

    @property
    def image_size(self) -> tuple[int, int]:
        return int(self.images.shape[1]), int(self.images.shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


def fingerprint_of(
    item_names: Iterable[str], class_labels: np.ndarray, contents: Iterable[str], image_size: Sequence[int]
) -> str:
    """SHA-256 in hex that changes when a name, a label, the content of an image or the image size changes.

    Args:
        contents: digests of the images, or of all of them at once.
    """
    parts = [list(item_names), class_labels.tolist(), list(contents), [int(n) for n in image_size]]
    # surrogateescape is how Python spells file names that are not UTF-8; JSON escapes them, so any name hashes.
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


def merge_twins(split_names: Sequence[str], contents: Sequence[Hashable]) -> list[str]:
    """Give items of equal content one split name, and with them all items that had one of theirs."""
    parent = {name: name for name in split_names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[Hashable, str] = {}
    for name, content in zip(split_names, contents, strict=True):
        parent[root(name)] = root(first.setdefault(content, name))
    return [root(name) for name in split_names]
