"""Latents: codecs between images and what networks are trained on."""

from smalti.latents.codec import Codec, CodecFacts, PixelCodec, Posterior
from smalti.latents.vae import AutoencoderCodec, codec_of, decode_batches, load_codec

__all__ = [
    "AutoencoderCodec",
    "Codec",
    "CodecFacts",
    "PixelCodec",
    "Posterior",
    "codec_of",
    "decode_batches",
    "load_codec",
]
