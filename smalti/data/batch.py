"""From an image set to the tensors that training sees, every choice a pure function of (seed, position)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from smalti.data.folder import ChangedFileError
from smalti.data.image_set import ImageSet
from smalti.data.order import Order
from smalti.streams import AUGMENT, key


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images with everything that is known about them.

    Attributes:
        images: in [-1, 1].
        class_labels: `None` when the set has no classes.
        indices: which images of the set these are; where a file changed under the run, its replacement.
        positions: places in the endless sequence of training samples; random numbers of a sample are keyed by them.
    """

    images: Float[Tensor, "B C H W"]
    class_labels: Int[Tensor, "B"] | None
    indices: Int[Tensor, "B"]
    positions: Int[Tensor, "B"]


def load_batch(image_set: ImageSet, order: Order, positions: Sequence[int], *, flip: bool, seed: int) -> ImageBatch:
    """The samples at the given positions.

    Args:
        flip: mirror half of the images left to right; keyed by (seed, epoch, index), so that the same image may be
            mirrored in one epoch and not in the next. Wrong for pictures whose sides mean something: flags, letters.

    Raises:
        DataError: a folder's files change or fail faster than they can be replaced; see
            `FolderImages.read`.
    """
    places = [order.at(position) for position in positions]
    pixels = np.empty((len(places), *image_set.image_size, 3), dtype=np.uint8)
    indices = [_read_or_replace(image_set, order, index, pixels[i]) for i, (_, index) in enumerate(places)]
    if flip:
        mirrored = [i for i, (epoch, index) in enumerate(places) if key(seed, AUGMENT, epoch, index) & 1]
        pixels[mirrored] = pixels[mirrored][:, :, ::-1]
    labels = torch.from_numpy(image_set.class_labels[indices]) if image_set.class_names else None
    return ImageBatch(
        images=to_unit_range(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()),
        class_labels=labels,
        indices=torch.tensor(indices, dtype=torch.int64),
        positions=torch.tensor(list(positions), dtype=torch.int64),
    )


def _read_or_replace(image_set: ImageSet, order: Order, index: int, out: np.ndarray) -> int:
    """Read an image into `out`; if its file changed, read another of the same order instead. Returns which one."""
    chosen = index
    for attempt in itertools.count():
        try:
            out[:] = image_set.read(chosen)
        except ChangedFileError:
            # Ends: the set itself raises another error when this happens more than now and then.
            chosen = order.replacement(index, attempt)
        else:
            return chosen
    raise AssertionError("unreachable")


def to_unit_range(images: UInt8[Tensor, "*B C H W"]) -> Float[Tensor, "*B C H W"]:
    """0 ... 255 to -1 ... 1, as float32: 0 becomes -1, 255 becomes 1 and white is exact."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Float[Tensor, "*B C H W"]) -> UInt8[Tensor, "*B C H W"]:
    """-1 ... 1 to 0 ... 255: `clamp(127.5 x + 128, 0, 255)`, cut off; undoes `to_unit_range` exactly."""
    return images.float().mul(127.5).add_(128).clamp_(0, 255).to(torch.uint8)
