"""From the bytes of a file to 8-bit RGB pixels of the wanted size, by rules that never guess.

A plain `Image.open(path).convert("RGB")` saturates 16-bit files, turns float files black, forgets the camera's
rotation, shows undefined colours where alpha is 0, and inflates a 300 KB file to 700 MB. Each of these has a rule here.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 50_000_000


_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")


class UnusableImageError(Exception):
    """One file cannot be used. The message is the reason, without the file's name."""


@dataclass(frozen=True)
class Decoded:
    """One decoded file.

    Attributes:
        image: mode RGB, turned upright.
        format: which decoder read it, e.g. `PNG`.
        mode: Pillow's name of the pixel format in the file, e.g. `CMYK`.
        notes: what was left out on the way, e.g. further frames of an animation.
    """

    image: Image.Image
    format: str
    mode: str
    notes: tuple[str, ...]


def looks_like_image(head: bytes) -> bool:
    """Whether a file that starts like this is probably one of `FORMATS`; for files whose name does not say so.

    BMP is left out: its mark is two letters that a text may start with.
    """
    return head.startswith(_MAGIC) and (not head.startswith(b"RIFF") or head[8:12] == b"WEBP")


def decode(data: bytes) -> Decoded:
    """Decode one image file: frame 0, upright, 8-bit RGB, transparent parts white. ICC profiles are not applied.

    Raises:
        UnusableImageError: not one of `FORMATS`, more than `MAX_PIXELS`, truncated or damaged, or of a pixel format
            (float, 32-bit integer, 16-bit TIFF) whose range is unknown.
    """
    if not data:
        raise UnusableImageError("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            return _decode_opened(opened)
    except UnusableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnusableImageError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnusableImageError(f"more than {MAX_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # a decoder fed with damaged bytes may raise anything; none of it is our state
        raise UnusableImageError(f"damaged: {type(error).__name__}: {str(error) or 'no further message'}") from error


def _decode_opened(opened: Image.Image) -> Decoded:
    # Nothing is inflated yet: `open` reads headers only.
    columns, rows = opened.size
    if columns * rows > MAX_PIXELS:
        raise UnusableImageError(f"{rows} x {columns} is more than {MAX_PIXELS // 1_000_000} million pixels")
    mode, format_name = opened.mode, str(opened.format)
    if mode == "F":
        raise UnusableImageError("float pixels: their range is unknown; save it with 8 bits per channel")
    if mode == "I":
        raise UnusableImageError("32-bit integer pixels: their range is unknown; save it with 8 bits per channel")
    if mode.startswith("I;16") and format_name == "TIFF":
        raise UnusableImageError("16-bit TIFF: its range is unknown; save it with 8 bits per channel")
    notes = ("animated or multi-page: only frame 0 is used",) if getattr(opened, "is_animated", False) else ()
    return Decoded(rgb_on_white(ImageOps.exif_transpose(opened)), format_name, mode, notes)


def rgb_on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB of any Pillow image with a known range; what is transparent shows white; 16 bits are divided by 257."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.float64)
        grey = np.rint(wide / 257).astype(np.uint8)
        if "transparency" in image.info:
            grey[wide == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, image_size: tuple[int, int]) -> Image.Image:
    """Scale until the image just covers (rows, columns), then cut the middle out.

    Halved by box filter as long as it stays at least twice as large as asked for, then scaled bicubically: the
    preprocessing of ADM, whose statistics published FIDs rely on. For a rectangle, "covers" takes the place of "the
    shorter side equals".

    Args:
        image: mode RGB.

    Source: Dhariwal & Nichol 2021, arXiv:2105.05233, whose released data loader defines it.
    """
    rows, columns = image_size
    while image.height >= 2 * rows and image.width >= 2 * columns:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(rows / image.height, columns / image.width)
    covering = max(columns, round(image.width * scale)), max(rows, round(image.height * scale))
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - columns) // 2, (image.height - rows) // 2
    return image.crop((left, top, left + columns, top + rows))
