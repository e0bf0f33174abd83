"""Heun's method on the probability-flow ODE: two evaluations per step, error of second order."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.diffusion.levels import Level
from smalti.diffusion.prediction import Denoise


@torch.no_grad()
def heun(
    denoise: Denoise,
    x: Float[Tensor, "B C H W"],
    levels: Sequence[Level],
    *,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Iterator[Float[Tensor, "B C H W"]]:
    """Yield the latents after each step from `levels[0]` (noise) to `levels[-1]`. Deterministic.

    Divided by `alpha + sigma`, every schedule becomes the straight path: `y = x / (alpha + sigma)` moves with velocity
    `eps - x0` in the time `sigma / (alpha + sigma)`, which runs from 1 to 0. In these coordinates both ends are
    regular, also where alpha is 0; the Euler step is DDIM's, and Heun's averages the velocities of its two ends. The
    step to clean stays Euler's, because there is no noise left to estimate there: n steps cost 2 n - 1 evaluations.

    Args:
        randn_like: never called; all samplers take it.

    Source: Karras et al. 2022, arXiv:2206.00364, algorithm 1, in the coordinates above.
    """
    for now, after in pairwise(levels):
        scale, after_scale = now.alpha + now.sigma, after.alpha + after.sigma
        duration = after.sigma / after_scale - now.sigma / scale
        x0, eps, _ = denoise(x, now)
        velocity = eps - x0
        y = x / scale
        x = torch.add(y, velocity, alpha=duration) * after_scale
        if after.sigma > 0:
            x0, eps, _ = denoise(x, after)
            x = torch.add(y, velocity + (eps - x0), alpha=duration / 2) * after_scale
        yield x
