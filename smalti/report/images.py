"""Tensors to PNG."""

import base64
import io
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from smalti.data import to_uint8
from smalti.report.files import replacing


def to_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """One image in [-1, 1]."""
    return Image.fromarray(to_uint8(image[None])[0].permute(1, 2, 0).contiguous().cpu().numpy())


GAP = 2


def grid(images: Float[Tensor, "N 3 H W"], *, columns: int, gap: int = GAP) -> Image.Image:
    """Images in rows, on a light grey ground."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 235, dtype=np.uint8)
    for i, tile in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet)


def save_grid(images: Float[Tensor, "N 3 H W"], path: Path, *, columns: int) -> None:
    """A grid as PNG; small images are enlarged by a whole number, without smoothing, so that they can be looked at.

    Raises:
        StorageError: the disk is full or refuses.
    """
    sheet = grid(images, columns=columns)
    factor = max(1, 800 // max(sheet.size))
    _save(sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST), path)


def first_of_rows(sheet: Image.Image, *, columns: int, width: int) -> Image.Image:
    """The first image of each row of a grid, side by side; the grid has square images of this width and `columns`."""
    factor = sheet.width / (columns * (width + GAP) + GAP)  # the whole number by which it was enlarged
    step, gap = round(factor * (width + GAP)), round(factor * GAP)
    rows = (sheet.height - gap) // step
    strip = Image.new("RGB", (rows * step + gap, step + gap), sheet.getpixel((0, 0)))
    for row in range(rows):
        strip.paste(sheet.crop((0, row * step, step + gap, (row + 1) * step + gap)), (row * step, 0))
    return strip.resize((round(strip.width / factor), round(strip.height / factor)), Image.Resampling.NEAREST)


def save_image(image: Float[Tensor, "3 H W"], path: Path) -> None:
    """One PNG in the image's own size; a reader never meets half of it.

    Raises:
        StorageError: the disk is full or refuses.
    """
    _save(to_pil(image), path)


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def data_url(image: Image.Image) -> str:
    """An image as text that a self-contained page can hold."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
