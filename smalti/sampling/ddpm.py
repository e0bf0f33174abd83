"""DDPM: ancestral sampling, one draw from the model's denoising step per level."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.diffusion.levels import Level, posterior, step_variance
from smalti.diffusion.prediction import Denoise


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    x: Float[Tensor, "B C H W"],
    levels: Sequence[Level],
    *,
    fixed_variance: Literal["large", "small"] = "large",
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Iterator[Float[Tensor, "B C H W"]]:
    """Yield the latents after each step from `levels[0]` (noise) to `levels[-1]`; the step to clean adds no noise.

    Any list of levels is a chain of its own, so respacing needs no second formula, and neither does flow.

    Args:
        fixed_variance: used when the network has no variance channels: large = variance of the noising step (beta),
            small = variance of the posterior; right for unit-variance and for single-point data, respectively.

    Source: Ho et al. 2020, arXiv:2006.11239, algorithm 2; learned variance: Nichol & Dhariwal 2021, arXiv:2102.09672,
    eq. 15.
    """
    for now, cleaner in pairwise(levels):
        x0, _, mix = denoise(x, now)
        x_t_weight, x0_weight, small = posterior(now, cleaner)
        x = torch.add(x_t_weight * x, x0, alpha=x0_weight)
        if cleaner.sigma > 0:
            low = math.log(small)
            high = math.log(step_variance(now.alpha, now.sigma, cleaner.alpha, cleaner.sigma))
            if mix is None:
                x = torch.add(x, randn_like(x), alpha=math.exp(0.5 * (high if fixed_variance == "large" else low)))
            else:
                x = x + torch.exp(0.5 * low + 0.5 * (high - low) * mix) * randn_like(x)
        yield x
