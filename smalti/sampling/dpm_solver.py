"""DPM-Solver++(2M): second order at one evaluation per step, from the estimate of the step before."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.diffusion.levels import Level
from smalti.diffusion.prediction import Denoise


@torch.no_grad()
def dpm_solver(
    denoise: Denoise,
    x: Float[Tensor, "B C H W"],
    levels: Sequence[Level],
    *,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Iterator[Float[Tensor, "B C H W"]]:
    """Yield the latents after each step from `levels[0]` (noise) to `levels[-1]`. Deterministic.

    Both ends are exact limits, not small numbers put in their place. A first level without signal (flow, t = 1) has a
    log-SNR of minus infinity: its own step and the one after it, whose history then lies infinitely far away, are of
    first order. So is the step to clean, where the log-SNR becomes infinite and the result is the estimate itself.

    Args:
        randn_like: never called; all samplers take it.

    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2, in half log-SNR; last step of first order as in sec. 6.
    """
    before: tuple[Tensor, float] | None = None  # the last estimate, and the log-SNR step that followed it
    for now, after in pairwise(levels):
        estimate, _, _ = denoise(x, now)
        step = after.log_snr - now.log_snr
        direction = estimate
        if before is not None and after.sigma > 0:
            previous, previous_step = before
            # The line through the last two estimates, read half a step ahead.
            direction = torch.add(estimate, estimate - previous, alpha=step / previous_step / 2)
        # exp of minus the step in half log-SNR, written without the logarithms that are infinite at the ends
        decay = (now.alpha * after.sigma) / (after.alpha * now.sigma)
        x = torch.add(after.sigma / now.sigma * x, direction, alpha=after.alpha * (1 - decay))
        before = (estimate, step)
        yield x
