"""`smalti autoencoder`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from smalti.training.autoencoder import AutoencoderConfig
from smalti.workflows.autoencoder import train_autoencoder


@dataclass(frozen=True)
class Autoencoder:
    """Train a small autoencoder of the kind that Stable Diffusion's latents come from, in minutes on a processor.

    The folder is one that diffusers reads and that `smalti encode --codec` takes. The same command again goes on where
    it stopped.
    """

    config: Annotated[AutoencoderConfig, tyro.conf.arg(name="")]

    def run(self) -> None:
        result = train_autoencoder(self.config)
        seen = "" if result.psnr is None else f"; {result.psnr:.2f} dB on images set aside"
        print(f"autoencoder in {result.out}: {result.facts.label}{seen}; originals and reconstructions in "
              f"{result.picture}")  # fmt: skip
