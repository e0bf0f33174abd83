"""`load_examples`: from what a user trains on, images or latents, to examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from smalti.data.examples import Examples, PixelExamples
from smalti.data.latent_set import LatentExamples, is_latents, open_latents
from smalti.data.sets import BUILT_IN, load_image_set, rows_and_columns
from smalti.errors import ConfigError


def load_examples(
    spec: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    posterior: Literal["sample", "mean"] = "sample",
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Open latents made by `smalti encode`, or images.

    Args:
        spec: a folder of latents or its URL; else as `load_image_set`.
        image_size: of images, to scale and crop to; of latents, that of the images that they were made of, or None.
        posterior: of latents; see `LatentExamples`.
        skip_unreadable, progress: of images; see `load_image_set`.

    Raises:
        ConfigError: the latents are of another image size.
        SmaltiError: as `open_latents` and `load_image_set`.
    """
    if str(spec) in BUILT_IN or not is_latents(spec):
        images = load_image_set(spec, image_size, skip_unreadable=skip_unreadable, progress=progress)
        return PixelExamples(images)
    latents, size = open_latents(spec), rows_and_columns(image_size)
    made_of = latents.record.identity.image_size
    if size is not None and size != made_of:
        raise ConfigError(
            f"{spec} was made of images of {made_of[0]}x{made_of[1]}, {size[0]}x{size[1]} were asked for; encode the "
            "images at that size, or leave the image size out"
        )
    return LatentExamples(latents, posterior)
