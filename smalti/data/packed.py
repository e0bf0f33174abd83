"""Image sets stored as one array and one table: `emoji32`, which is shipped, and sets that `smalti data build` makes.

A packed set is a folder with
- `items.json`: name, class names, and for each image its name, the name it is split by, its class label;
- `images.npy.xz` (small sets, shipped) or `images.npy` (large sets, read through the page cache): uint8 (N, H, W, 3).

xz rather than PNG or zlib: one encoder library exists for it, so the same pixels give the same bytes on other
machines, and on these images it is 20 % smaller than an optimised PNG sheet.
"""

import hashlib
import io
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smalti.data.image_set import ArrayImages, fingerprint_of
from smalti.errors import DataError

FORMAT_VERSION = 1
_COLUMNS = ("item_names", "split_names", "class_labels")


@dataclass(frozen=True)
class PackedItems:
    """The table of a packed set; the three columns are as long as the set has images.

    Attributes:
        split_names: items with an equal one always fall on the same side of a split.
        class_labels: positions in `class_names`.
    """

    name: str
    class_names: Sequence[str]
    item_names: Sequence[str]
    split_names: Sequence[str]
    class_labels: Sequence[int]


def pack_images(images: np.ndarray) -> bytes:
    """The content of `images.npy.xz` for uint8 (N, H, W, 3); a pure function of the pixels."""
    plain = io.BytesIO()
    np.lib.format.write_array(plain, np.ascontiguousarray(images), version=(1, 0), allow_pickle=False)
    # pb=0: RGB triplets are not aligned to four bytes.
    options = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0, "dict_size": 8 << 20}
    return lzma.compress(plain.getvalue(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=[options])


def pack_items(items: PackedItems, images: np.ndarray) -> bytes:
    """The content of `items.json`: readable, one item a line, the same bytes for the same items."""
    head = {
        "format_version": FORMAT_VERSION,
        "name": items.name,
        "images_sha256": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
        "class_names": list(items.class_names),
        "columns": list(_COLUMNS),
    }
    rows = zip(items.item_names, items.split_names, map(int, items.class_labels), strict=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return (json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "items": [\n{lines}\n]\n}}\n').encode()


def load_packed(folder: Path) -> ArrayImages:
    """Read a packed set.

    Raises:
        DataError: a file is missing, damaged, of another format version, or the two files do not belong together.
    """
    table = _read_table(folder / "items.json")
    packed, plain = folder / "images.npy.xz", folder / "images.npy"
    try:
        if packed.is_file():
            stored: Any = io.BytesIO(lzma.decompress(packed.read_bytes()))
            images = np.lib.format.read_array(stored, allow_pickle=False)
        else:
            images = np.load(plain, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise DataError(
            f"{folder}: the images of this set cannot be read ({error}); build or install it again"
        ) from error
    rows = table["items"]
    if images.ndim != 4 or images.shape[0] != len(rows) or images.shape[3] != 3 or images.dtype != np.uint8:
        raise DataError(
            f"{folder}: expected uint8 images ({len(rows)}, H, W, 3) as items.json lists, got {images.dtype} "
            f"{images.shape}; build or install it again"
        )
    if hashlib.sha256(images.data).hexdigest() != table["images_sha256"]:
        raise DataError(f"{folder}: the images do not match the checksum in items.json; build or install it again")
    item_names, split_names, labels = (tuple(row[i] for row in rows) for i in range(3))
    class_labels = np.asarray(labels, dtype=np.int64)
    return ArrayImages(
        name=table["name"],
        class_names=tuple(table["class_names"]),
        class_labels=class_labels,
        item_names=item_names,
        split_names=split_names,
        fingerprint=fingerprint_of(item_names, class_labels, [table["images_sha256"]], images.shape[1:3]),
        images=images,
    )


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable table ({error}); build or install the set again") from error
    if (
        not isinstance(table, dict)
        or table.get("format_version") != FORMAT_VERSION
        or table.get("columns") != list(_COLUMNS)
    ):
        raise DataError(f"{path}: expected a table of format version {FORMAT_VERSION}; build or install the set again")
    return table
