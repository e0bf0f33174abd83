"""Which images a run was trained on: those of its settings, or of latents those that they were made of."""

from dataclasses import replace
from pathlib import Path

from smalti.data.latent_record import read_record
from smalti.data.latent_set import is_latents
from smalti.data.sets import BUILT_IN
from smalti.errors import ConfigError
from smalti.storage.objects import open_store
from smalti.training.config import RunConfig
from smalti.workflows.run_folder import CONFIG, load_config


def trained_on(run: Path) -> RunConfig | None:
    """The settings of the training run, if this is its folder; of latents, with the images that they were made of.

    Raises:
        ConfigError: only some images were encoded, so that their split is another one.
    """
    if not (run / CONFIG).is_file():
        return None
    config = load_config(run / CONFIG)
    data = config.data.path
    if data in BUILT_IN or not is_latents(data):
        return config
    identity = read_record(open_store(data)).identity
    if identity.count < identity.source_count:
        raise ConfigError(
            f"{run} was trained on latents of the first {identity.count:,} of {identity.source_count:,} images of "
            f"{identity.source}, so its split is not that of the images; give --reference REAL-IMAGES and --training "
            "none, or --training IMAGES"
        )
    rows, columns = identity.image_size
    images = replace(config.data, path=identity.source, image_size=rows if rows == columns else None)
    return replace(config, data=images)


def part_of(config: RunConfig, part: str) -> str:
    """How `open_images` calls the images that a run trained on, or those that it set aside."""
    fraction = config.data.validation_fraction
    return f"{config.data.path}#{part},seed={config.seed},fraction={fraction}" if fraction else config.data.path
