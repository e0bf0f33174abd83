"""The table of samplers, and the settings of a sampling run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.config import did_you_mean
from smalti.diffusion.levels import Level
from smalti.diffusion.prediction import Denoise
from smalti.errors import ConfigError
from smalti.sampling.ddim import ddim
from smalti.sampling.ddpm import ddpm
from smalti.sampling.dpm_solver import dpm_solver
from smalti.sampling.heun import heun


@dataclass(frozen=True)
class Sampler:
    """A row of the table.

    Args:
        run: generator `(denoise, x, levels, *, randn_like, ...)`.
        options: fields of `SamplingConfig` that it takes beside those.
        evaluations: network evaluations for n steps.
    """

    run: Callable[..., Iterator[Tensor]]
    options: tuple[str, ...] = ()
    evaluations: Callable[[int], int] = lambda steps: steps


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, options=("fixed_variance",)),
    "ddim": Sampler(ddim, options=("eta",)),
    "heun": Sampler(heun, evaluations=lambda steps: 2 * steps - 1),
    "dpm-solver++": Sampler(dpm_solver),
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to draw images. The defaults are the papers': 250 ancestral steps, no guidance.

    Args:
        sampler: ddpm (ancestral), ddim, heun (two evaluations per step) or dpm-solver++ (good from 20 steps).
        num_inference_steps: steps from noise to clean.
        spacing: which levels are visited. Chains: respaced, ddim, uniform, log_snr, or sections as "10,10,10".
            Flow: uniform. "default" is respaced, or uniform for flow.
        shift: flow only: above 1 spends more steps near noise.
        guidance_scale: 1 = off, about 1.5 for best FID, 4 for pictures.
        guidance_interval: guide only between these times (0 = clean, 1 = noise).
        guidance_channels: all, or how many of the first latent channels (the DiT paper's code: 3 of 4).
        eta: ddim only: 0 = deterministic, 1 = as noisy as ddpm.
        fixed_variance: ddpm only, for networks that do not learn the variance: large or small.
        clip_x0: limit estimates of clean images to [-1, 1]; for pixels, not for scaled codec latents.

    Raises:
        ConfigError: a value out of its range, or an option of another sampler.
    """

    sampler: Literal["ddpm", "ddim", "heun", "dpm-solver++"] = "ddpm"
    num_inference_steps: int = 250
    spacing: str = "default"
    shift: float = 1.0
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: Literal["all"] | int = "all"
    eta: float = 0.0
    fixed_variance: Literal["large", "small"] = "large"
    clip_x0: bool = False

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"unknown sampler {self.sampler!r}{did_you_mean(self.sampler, SAMPLERS)}")
        if self.num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"eta must be between 0 (deterministic) and 1 (as noisy as ddpm), got {self.eta}")
        if self.eta != 0 and self.sampler != "ddim":
            raise ConfigError(f"eta {self.eta} has no meaning for sampler {self.sampler!r}; it belongs to ddim")


def run_sampler(
    config: SamplingConfig,
    denoise: Denoise,
    x: Float[Tensor, "B C H W"],
    levels: Sequence[Level],
    *,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Iterator[Float[Tensor, "B C H W"]]:
    """The latents after each step of the sampler that `config` names."""
    sampler = SAMPLERS[config.sampler]
    options = {name: getattr(config, name) for name in sampler.options}
    return sampler.run(denoise, x, levels, randn_like=randn_like, **options)
