"""Bilinear resizing as TensorFlow 1 does it, which the published FID numbers were made with."""

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.errors import DataError


def resize_tf1(images: Tensor, size: int | tuple[int, int]) -> Float[Tensor, "B C rows columns"]:
    """Scale images so that output pixel i lies at i * (input size / output size), without smoothing when they shrink.

    Most libraries put it at (i + 0.5) * ratio - 0.5, which moves an image of 32 pixels, made 299, by 0.45 of them, and
    the FID with it (Parmar et al. 2022, arXiv:2104.11222, compare such rules).

    Args:
        images: uint8 or floating point (B, C, H, W), of any range; it is kept.
        size: rows and columns.

    Raises:
        DataError: no image, or a size below 1.

    Source: ResizeBilinear of TensorFlow 1 with align_corners=False and half_pixel_centers=False.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    if images.ndim != 4 or 0 in images.shape or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise DataError(
            f"expected uint8 or floating-point images (B, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if min(rows, columns) < 1:
        raise DataError(f"images cannot become {rows} x {columns} pixels: give at least 1 x 1")
    result = images.float()
    if result.shape[3] != columns:
        result = result @ _weights(result.shape[3], columns, result.device)
    if result.shape[2] != rows:
        lower, upper, fraction = _positions(result.shape[2], rows, result.device)
        result = torch.lerp(result.index_select(2, lower), result.index_select(2, upper), fraction[:, None])
    return result


def _positions(before: int, after: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two input pixels between which each output pixel lies, and how far it is from the first to the second."""
    # PARITY: top-left-pixels. Positions are i * ratio, and float32 as in TensorFlow, which moves 8-bit values by 1e-4.
    ratio = torch.tensor(before, dtype=torch.float32) / torch.tensor(after, dtype=torch.float32)
    positions = torch.arange(after, dtype=torch.float32) * ratio
    lower = positions.floor().clamp(max=before - 1)
    fraction = positions - lower
    upper = (lower + 1).clamp(max=before - 1)
    return lower.long().to(device), upper.long().to(device), fraction.to(device)


def _weights(before: int, after: int, device: torch.device) -> Tensor:
    """(before, after), two numbers in each column: as a product, columns take a third of the time of gathering them."""
    lower, upper, fraction = _positions(before, after, torch.device("cpu"))
    outputs = torch.arange(after)
    weights = torch.zeros(before, after, dtype=torch.float32)
    weights[lower, outputs] = 1 - fraction
    weights[upper, outputs] += fraction
    return weights.to(device)
