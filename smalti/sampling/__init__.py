"""Sampling: four loops you can see, the table of them, and the noise that makes samples repeatable."""

from smalti.sampling.config import SAMPLERS, Sampler, SamplingConfig, run_sampler
from smalti.sampling.noise import SeededNoise
from smalti.sampling.sample import SampleBatch, sample_latents

__all__ = ["SAMPLERS", "SampleBatch", "Sampler", "SamplingConfig", "SeededNoise", "run_sampler", "sample_latents"]
