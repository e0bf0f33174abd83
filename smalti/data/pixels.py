"""Whole images of a set by index, for whoever looks at them outside the training order."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from smalti.data.batch import to_unit_range
from smalti.data.image_set import ImageSet


def read_images(image_set: ImageSet, indices: Iterable[int]) -> Float[Tensor, "N C H W"]:
    """The images in the order asked for, in [-1, 1].

    Raises:
        DataError: a file cannot be read any more.
    """
    return to_unit_range(read_pixels(image_set, indices))


def read_pixels(image_set: ImageSet, indices: Iterable[int]) -> UInt8[Tensor, "N C H W"]:
    """The same as they are stored, 8-bit.

    Raises:
        DataError: a file cannot be read any more.
    """
    pixels = np.stack([image_set.read(int(index)) for index in indices])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
