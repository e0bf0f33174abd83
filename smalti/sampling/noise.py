"""Noise that depends on an image's seed and on nothing else, in any batch and order."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from smalti import streams


class SeededNoise:
    """Unit noise for a batch of images, one seed each; call it in place of `torch.randn_like`.

    The first call gives the start noise, the n-th call after it the noise of the n-th draw. Row i is a function of
    `seeds[i]`, of the number of the call and of the shape. Numbers are drawn on the CPU, in float32, so that devices
    agree.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(seeds)
        self._draws = 0

    def __call__(self, like: Float[Tensor, "B *rest"]) -> Float[Tensor, "B *rest"]:
        """Noise of the shape, dtype and device of `like`; its number of rows must be the number of seeds."""
        if len(like) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds cannot make noise for {len(like)} rows: give one seed per row")
        noise = torch.empty(like.shape, dtype=torch.float32)
        for row, seed in zip(noise, self.seeds, strict=True):
            torch.randn(row.shape, generator=streams.generator(seed, streams.SAMPLE_NOISE, self._draws), out=row)
        self._draws += 1
        return noise.to(device=like.device, dtype=like.dtype)
