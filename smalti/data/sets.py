"""`load_image_set`: from what a user writes (`emoji32`, a folder, tar shards) to an image set."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from smalti.config import did_you_mean
from smalti.data.decoding import centre_crop
from smalti.data.folder import load_folder
from smalti.data.image_set import ArrayImages, ImageSet, fingerprint_of
from smalti.data.index_file import cache_folder
from smalti.data.packed import load_packed
from smalti.data.shard_place import is_shards
from smalti.data.shards import load_shards
from smalti.errors import ConfigError, DataError

__all__ = ["BUILT_IN", "cache_folder", "load_image_set", "rows_and_columns"]

BUILT_IN = ("emoji32", "emoji64")
_SHIPPED = Path(__file__).resolve().parent / "emoji32"


def load_image_set(
    spec: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    allow_empty: bool = False,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Load a set by name, or a folder of images after checking every file in it.

    Args:
        spec: `emoji32`; `emoji64`, after `smalti data build emoji64`; or a folder: images directly in it (no classes),
            or one sub-folder per class, or a set built into a folder of your own. A folder that is called like a set
            is meant by `./emoji32`. Or tar shards: a folder of them, `shards/train-{000..099}.tar`, or a URL of either.
        image_size: side, or (rows, columns), in pixels; other images are scaled and centre-cropped. `None` keeps
            the images as they are, which must then all have one size.
        allow_empty: accept class folders without an image; their labels stay reserved.
        skip_unreadable: leave out files that cannot be used, instead of refusing the folder.
        progress: called with (files done, files found) while a folder is checked, of shards once for each.

    Raises:
        ConfigError: the image size is not positive.
        DataError: the set was not built, or the folder is missing, empty or holds files that cannot be used.
        StorageError: a store cannot be reached, or an index cannot be kept.
    """
    size = rows_and_columns(image_size)
    if spec == "emoji32":
        return _resized(load_packed(_SHIPPED), size)
    if spec == "emoji64":
        built = cache_folder() / "emoji64"
        if not built.is_dir():
            raise DataError(f"emoji64 is not built yet ({built} does not exist); run `smalti data build emoji64`")
        return _resized(load_packed(built), size)
    if is_shards(spec):
        return load_shards(spec, size, allow_empty=allow_empty, skip_unreadable=skip_unreadable, progress=progress)
    folder = Path(spec)
    if not folder.exists():
        hint = "" if folder.parent != Path() else did_you_mean(str(spec), BUILT_IN)
        raise DataError(f"{str(spec)!r} is neither an image set ({', '.join(BUILT_IN)}) nor an existing folder{hint}")
    if (folder / "items.json").is_file() and any((folder / f).is_file() for f in ("images.npy", "images.npy.xz")):
        return _resized(load_packed(folder), size)
    return load_folder(folder, size, allow_empty=allow_empty, skip_unreadable=skip_unreadable, progress=progress)


def rows_and_columns(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """An image size as users give it, a side or (rows, columns); None stays None.

    Raises:
        ConfigError: it is not positive.
    """
    if image_size is None:
        return None
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(rows, columns) < 1:
        raise ConfigError(f"image size {image_size} is not positive; give the rows and columns in pixels")
    return rows, columns


def _resized(images: ArrayImages, size: tuple[int, int] | None) -> ArrayImages:
    if size is None or size == images.image_size:
        return images
    pixels = np.stack([np.asarray(centre_crop(Image.fromarray(image), size)) for image in images.images])
    changed = fingerprint_of(images.item_names, images.class_labels, [images.fingerprint], size)
    return dataclasses.replace(images, images=pixels, fingerprint=changed)
