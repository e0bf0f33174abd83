"""Between images and what a network is trained on. Pixel space is the codec that changes nothing."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CodecFacts:
    """What a model, a latent set or a result must say of the codec that it belongs to.

    Args:
        kind: "pixels" or "autoencoder-kl".
        channels: of the latents.
        factor: pixels per latent, along rows and along columns.
        scale, shift: latents = (z - shift) * scale, where z is what the encoder makes; near unit variance.
        source: folder or hub name that the weights came from; "" for pixels.
        sha256: of the weights, names and values; "" for pixels.
        encoder_sha256: of the encoder's part of them, rounded to half precision, so that it is the same in files of
            either; "" for pixels.
    """

    kind: str = "pixels"
    channels: int = 3
    factor: int = 1
    scale: float = 1.0
    shift: float = 0.0
    source: str = ""
    sha256: str = ""
    encoder_sha256: str = ""

    @property
    def label(self) -> str:
        """Short, for protocols and people: `pixels`, `autoencoder-kl 3f2a91c0d4e5`."""
        return f"{self.kind} {self.sha256[:12]}".rstrip()

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents of images of this size.

        Raises:
            ConfigError: the size is no multiple of the factor.
        """
        rows, columns = image_size
        if rows % self.factor or columns % self.factor:
            raise ConfigError(
                f"image size {rows}x{columns} is no multiple of {self.factor}, which this codec ({self.label}) shrinks "
                "by; choose another image size"
            )
        return self.channels, rows // self.factor, columns // self.factor

    def image_size(self, sample_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns in pixels of latents of this size."""
        return sample_size[0] * self.factor, sample_size[1] * self.factor


class Posterior(NamedTuple):
    """What an image is encoded as: independent normal variables, in the scale that networks are trained on."""

    mean: Float[Tensor, "B C H W"]
    std: Float[Tensor, "B C H W"]

    def sample(self, eps: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Latents drawn with this unit noise."""
        return self.mean + self.std * eps


@runtime_checkable
class Codec(Protocol):
    """Encodes images and decodes latents; holds no state that either changes."""

    @property
    def facts(self) -> CodecFacts: ...

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Posterior:
        """Images in [-1, 1] to the scaled posterior of their latents, on the codec's device."""
        ...

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 H W"]:
        """Scaled latents to images, about [-1, 1], not clamped."""
        ...


class PixelCodec:
    """Pixel space: latents are the images themselves, without spread."""

    facts = CodecFacts()

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Posterior:
        return Posterior(images, torch.zeros_like(images))

    def decode(self, latents: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        return latents
