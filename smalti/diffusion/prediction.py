"""What a network predicts, and how to read clean latents and noise from it.

Every prediction is a fixed mixture `a * x0 + b * eps`. Together with `x_t = alpha * x0 + sigma * eps` it makes two
equations for the two unknowns, so one solution serves all of them, on any schedule.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.config import did_you_mean
from smalti.diffusion.levels import Level, LevelBatch
from smalti.errors import ConfigError

Number = TypeVar("Number", float, Tensor)


def _eps(alpha: Number, sigma: Number) -> tuple[Number, Number]:
    return 0 * alpha, 0 * sigma + 1


def _x0(alpha: Number, sigma: Number) -> tuple[Number, Number]:
    return 0 * alpha + 1, 0 * sigma


def _v(alpha: Number, sigma: Number) -> tuple[Number, Number]:
    return -sigma, alpha


def _velocity(alpha: Number, sigma: Number) -> tuple[Number, Number]:
    return 0 * alpha - 1, 0 * sigma + 1


# name -> the weights (a, b) of the target a * x0 + b * eps
#   eps       the noise            Ho et al. 2020, arXiv:2006.11239
#   x0        the clean latents
#   v         alpha eps - sigma x0 Salimans & Ho 2022, arXiv:2202.00512, sec. 4
#   velocity  eps - x0             Lipman et al. 2023, arXiv:2210.02747, with time running from clean to noise
PREDICTIONS: dict[str, Callable[..., tuple]] = {"eps": _eps, "x0": _x0, "v": _v, "velocity": _velocity}


class Denoised(NamedTuple):
    """What a sampler learns from one network evaluation.

    Args:
        x0, eps: estimates of clean latents and unit noise; `alpha * x0 + sigma * eps` is the input again.
        mix: where between its bounds the learned log variance lies: 0 posterior variance, 1 step variance; not
            limited to that range. None when the network has no variance channels.
    """

    x0: Float[Tensor, "B C H W"]
    eps: Float[Tensor, "B C H W"]
    mix: Float[Tensor, "B C H W"] | None = None


Denoise = Callable[[Tensor, Level], Denoised]


def target_weights(prediction: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """`(a, b)`: the network is to output `a * x0 + b * eps`.

    Raises:
        ConfigError: there is no such prediction.
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(f"unknown prediction {prediction!r}{did_you_mean(prediction, PREDICTIONS)}")
    return PREDICTIONS[prediction](alpha, sigma)


def training_target(
    prediction: str, x0: Float[Tensor, "B C H W"], eps: Float[Tensor, "B C H W"], levels: LevelBatch
) -> Float[Tensor, "B C H W"]:
    """What the network should have said about `alpha * x0 + sigma * eps`."""
    a, b = target_weights(prediction, levels.alpha, levels.sigma)
    return per_sample(a, x0) * x0 + per_sample(b, x0) * eps


def add_noise(
    x0: Float[Tensor, "B C H W"], eps: Float[Tensor, "B C H W"], levels: LevelBatch
) -> Float[Tensor, "B C H W"]:
    """`x_t = alpha * x0 + sigma * eps`, each sample at its own level."""
    return per_sample(levels.alpha, x0) * x0 + per_sample(levels.sigma, x0) * eps


def x0_weights(prediction: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """`(p, q)`: the estimate of clean latents is `p * x_t + q * output`. Infinite for eps at `alpha = 0`."""
    a, b = target_weights(prediction, alpha, sigma)
    determinant = alpha * b - sigma * a
    return b / determinant, -sigma / determinant


def eps_weights(prediction: str, alpha: Number, sigma: Number) -> tuple[Number, Number]:
    """`(p, q)`: the estimate of the noise is `p * x_t + q * output`. Infinite for x0 at `sigma = 0`."""
    a, b = target_weights(prediction, alpha, sigma)
    determinant = alpha * b - sigma * a
    return -a / determinant, alpha / determinant


def to_denoised(
    output: Float[Tensor, "B O H W"],
    x_t: Float[Tensor, "B C H W"],
    level: Level,
    prediction: str,
    *,
    learned_variance: bool = False,
    clip_x0: bool = False,
) -> Denoised:
    """Read a network's output at one level.

    Args:
        output: C channels, or 2 C with learned variance: the prediction, then the variance channels.
        clip_x0: limit the estimate of clean latents to [-1, 1], and let the noise estimate follow. For pixels;
            scaled codec latents go beyond 1.

    Raises:
        ConfigError: wrong channel count, unknown prediction, or noise prediction where no signal is left.
    """
    if level.alpha == 0 and prediction == "eps":
        raise ConfigError("prediction 'eps' cannot tell x0 from pure noise (alpha 0); with flow use velocity, v or x0")
    channels = x_t.shape[1]
    if output.shape[1] != channels * (1 + learned_variance):
        raise ConfigError(
            f"the network gave {output.shape[1]} channels for {channels} latent channels; expected "
            f"{channels * (1 + learned_variance)} with learned_variance={learned_variance}"
        )
    output = output.to(x_t.dtype)
    mix = (output[:, channels:] + 1) / 2 if learned_variance else None
    output = output[:, :channels]
    x0 = _combine(x_t, output, *x0_weights(prediction, level.alpha, level.sigma))
    if clip_x0:
        x0 = x0.clamp(-1, 1)
        return Denoised(x0, (x_t - level.alpha * x0) / level.sigma, mix)
    return Denoised(x0, _combine(x_t, output, *eps_weights(prediction, level.alpha, level.sigma)), mix)


def per_sample(values: Float[Tensor, "B"], like: Float[Tensor, "B *rest"]) -> Float[Tensor, "B *ones"]:
    """One number per sample, on the device and in the dtype of `like`, ready to multiply it."""
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def _combine(x_t: Tensor, output: Tensor, x_weight: float, output_weight: float) -> Tensor:
    if x_weight == 0 and output_weight == 1:
        return output
    return torch.add(x_weight * x_t, output, alpha=output_weight)
