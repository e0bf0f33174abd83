"""Latents: codecs between images and what networks are trained on."""

from smalti.latents.codec import Codec, CodecFacts, PixelCodec, Posterior

__all__ = ["Codec", "CodecFacts", "PixelCodec", "Posterior"]
