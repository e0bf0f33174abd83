"""DDIM: step along the estimated clean latents and noise. With `eta = 0` on flow levels it is the Euler method."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.diffusion.levels import Level, posterior
from smalti.diffusion.prediction import Denoise


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Float[Tensor, "B C H W"],
    levels: Sequence[Level],
    *,
    eta: float = 0.0,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Iterator[Float[Tensor, "B C H W"]]:
    """Yield the latents after each step from `levels[0]` (noise) to `levels[-1]`.

    With `eta = 0` the levels may also run the other way, from clean to noise: that encodes latents.

    Args:
        eta: 0 = deterministic, 1 = as noisy as DDPM with the posterior variance.

    Source: Song et al. 2021, arXiv:2010.02502, eq. 12 and 16.
    """
    for now, after in pairwise(levels):
        x0, eps, _ = denoise(x, now)
        fresh = eta * math.sqrt(posterior(now, after).variance) if eta > 0 else 0.0
        x = torch.add(after.alpha * x0, eps, alpha=math.sqrt(after.sigma**2 - fresh**2))
        if fresh > 0:
            x = torch.add(x, randn_like(x), alpha=fresh)
        yield x
