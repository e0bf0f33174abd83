"""What training minimises, and bits per dimension: sums of one simple loss and one variational term.

Levels arrive in float64 on the CPU; weights are worked out there and only then moved to the latents' device and dtype,
because `1 - alpha**2` and its logarithms do not survive float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.diffusion.guidance import BackboneFunction
from smalti.diffusion.levels import Level, LevelBatch, Schedule, level_batch, posterior_weights
from smalti.diffusion.prediction import (
    Denoise,
    add_noise,
    per_sample,
    target_weights,
    training_target,
    x0_weights,
)
from smalti.diffusion.timesteps import logit_normal
from smalti.errors import ConfigError

Variance = Literal["learned", "large", "small"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the network learns to predict, at which levels, weighted how. The defaults are the papers'.

    Args:
        schedule: linear, cosine, or flow (flow matching is `schedule="flow", prediction="velocity"`).
        num_train_timesteps: length of the chain; for flow, the timestep told to the backbone at pure noise.
        prediction: eps, x0, v (`alpha eps - sigma x0`) or velocity (`eps - x0`).
        timestep_sampling: uniform, or logit_normal, which visits the middle of the path more often.
        logit_mean, logit_std: of the normal variable whose sigmoid is the time; above 0 leans to noise.
        loss_weighting: none; min_snr, which caps the weight of nearly clean levels; or velocity, which measures any
            prediction's error as that of the velocity (sigma below 0.05 counts as 0.05).
        min_snr_gamma: that cap, as a signal-to-noise ratio.
        variational_weight: of the variational bound beside the simple loss, when the backbone learns its variance.
        label_dropout: share of class labels hidden in training, which guidance needs; 0 = none.
        label_drop: shared = a label is hidden from the whole network; independent = from each label table on its own,
            which is what U-DiT's released training does with its three tables.

    Raises:
        ConfigError: a value out of its range, or noise prediction on the flow path, where the start has no signal.
    """

    schedule: Literal["linear", "cosine", "flow"] = "linear"
    num_train_timesteps: int = 1000
    prediction: Literal["eps", "x0", "v", "velocity"] = "eps"
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    loss_weighting: Literal["none", "min_snr", "velocity"] = "none"
    min_snr_gamma: float = 5.0
    variational_weight: float = 1.0
    label_dropout: float = 0.1
    label_drop: Literal["shared", "independent"] = "shared"

    def __post_init__(self) -> None:
        if self.schedule == "flow" and self.prediction == "eps":
            raise ConfigError(
                "schedule 'flow' starts from pure noise, where prediction 'eps' cannot tell x0; use 'velocity'"
            )
        if not 0 <= self.label_dropout <= 1:
            raise ConfigError(f"label_dropout must be between 0 and 1, got {self.label_dropout}")
        if not self.logit_std > 0:
            raise ConfigError(f"logit_std must be above 0, got {self.logit_std}")
        if not self.min_snr_gamma > 0:
            raise ConfigError(f"min_snr_gamma must be above 0 (the paper uses 5), got {self.min_snr_gamma}")
        if not self.variational_weight >= 0:
            raise ConfigError(f"variational_weight must be 0 or more, got {self.variational_weight}")


class Losses(NamedTuple):
    """One number per sample. `loss` is what training minimises; `mse` is unweighted; `vb` in bits per dimension."""

    loss: Float[Tensor, "B"]
    mse: Float[Tensor, "B"]
    vb: Float[Tensor, "B"] | None


def draw_levels(schedule: Schedule, config: ObjectiveConfig, uniforms: Float[Tensor, "B"]) -> LevelBatch:
    """The level of each sample as a function of one number in [0, 1) per sample."""
    if config.timestep_sampling == "logit_normal":
        uniforms = logit_normal(uniforms, config.logit_mean, config.logit_std)
    return schedule.at(uniforms)


def training_losses(
    backbone: BackboneFunction,
    x0: Float[Tensor, "B C H W"],
    class_labels: Int[Tensor, "B"] | Int[Tensor, "B K"] | None,
    *,
    eps: Float[Tensor, "B C H W"],
    levels: LevelBatch,
    config: ObjectiveConfig,
    learned_variance: bool = False,
) -> Losses:
    """Losses of one batch: noise it, run the backbone, compare.

    Args:
        class_labels: after label dropout.
        eps: unit noise. levels: from `draw_levels`. Both are the caller's, so that a step is repeatable.

    Raises:
        ConfigError: the schedule is continuous and the variance is learned.
    """
    x_t = add_noise(x0, eps, levels)
    timesteps = levels.timesteps.to(device=x0.device, dtype=torch.float32)
    output = backbone(x_t, timesteps, class_labels)
    return losses_from_output(output, x0, eps=eps, levels=levels, config=config, learned_variance=learned_variance)


def losses_from_output(
    output: Float[Tensor, "B O H W"],
    x0: Float[Tensor, "B C H W"],
    *,
    eps: Float[Tensor, "B C H W"],
    levels: LevelBatch,
    config: ObjectiveConfig,
    learned_variance: bool = False,
) -> Losses:
    """Losses of a backbone's output at `add_noise(x0, eps, levels)`; arithmetic in the dtype of `x0`.

    With learned variance the loss is simple + `variational_weight` * bound, and the bound sends no gradient into the
    prediction channels, only into the variance channels.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16. The released DiT code weighs the bound 1; the paper's own
    0.001 times 1000 terms is the same for 1000 timesteps, and `num_timesteps / 1000` for other chains.
    """
    channels = x0.shape[1]
    output = output.to(x0.dtype)
    residual = output[:, :channels] - training_target(config.prediction, x0, eps, levels)
    mse = residual.square().flatten(1).mean(1)
    loss = mse
    if config.loss_weighting == "min_snr":
        weights = min_snr_weights(config.prediction, levels, config.min_snr_gamma)
        loss = loss * weights.to(device=x0.device, dtype=x0.dtype)
    elif config.loss_weighting == "velocity":
        loss = loss * velocity_weights(config.prediction, levels).to(device=x0.device, dtype=x0.dtype)
    if not learned_variance:
        return Losses(loss, mse, None)
    x0_error = per_sample(x0_weights(config.prediction, levels.alpha, levels.sigma)[1], x0) * residual.detach()
    mix = (output[:, channels:] + 1) / 2
    vb = variational_bound(x0, x0_error, levels, mix=mix)
    return Losses(loss + config.variational_weight * vb, mse, vb)


def min_snr_weights(prediction: str, levels: LevelBatch, gamma: float = 5.0) -> Float[Tensor, "B"]:
    """Weights that turn the squared error of any prediction into `min(snr, gamma)` times that of x0.

    The error of x0 is `sigma / (alpha b - sigma a)` times the error of the target `a x0 + b eps`; for eps this gives
    the paper's `min(snr, gamma) / snr`, for v `min(snr, gamma) / (snr + 1)`, and it holds for velocity too.

    Source: Hang et al. 2023, arXiv:2303.09556, sec. 3.4.
    """
    a, b = target_weights(prediction, levels.alpha, levels.sigma)
    determinant = levels.alpha * b - levels.sigma * a
    return torch.minimum(levels.alpha**2, gamma * levels.sigma**2) / determinant**2


def velocity_weights(prediction: str, levels: LevelBatch, smallest_sigma: float = 0.05) -> Float[Tensor, "B"]:
    """Weights that turn the squared error of any prediction into that of the velocity `eps - x0`.

    With prediction x0 the network need not carry the noise through to its output, and the levels still count as in
    flow matching. The velocity of an estimate of x0 divides by sigma, so sigma is limited below.

    Source: Li & He 2025, arXiv:2511.13720, sec. 4.
    """
    limited = levels.sigma.clamp_min(smallest_sigma)
    x0_error = x0_weights(prediction, levels.alpha, limited)[1]
    return (x0_error / x0_weights("velocity", levels.alpha, limited)[1]) ** 2


def variational_bound(
    x0: Float[Tensor, "B C H W"],
    x0_error: Float[Tensor, "B C H W"],
    levels: LevelBatch,
    *,
    mix: Float[Tensor, "B C H W"] | None = None,
    variance: Variance = "learned",
) -> Float[Tensor, "B"]:
    """One term of the variational bound for each sample, in bits per dimension.

    KL from the true posterior to the model's; at the cleanest level, the negative log-likelihood of 8-bit pixels.

    Args:
        x0_error: estimated minus true clean latents. A difference, because near the clean end the two agree in more
            digits than float32 has.
        mix: as in `Denoised`; needed for learned variance.
        variance: learned, or fixed: large (beta) or small (posterior variance).

    Raises:
        ConfigError: the schedule is continuous, or `mix` is missing.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 5 and 13; Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 14 and 15.
    """
    if levels.previous_alpha is None or levels.previous_sigma is None or levels.min_log_variance is None:
        raise ConfigError(
            "the variational bound (learned variance, bits per dimension) needs a schedule with discrete steps: "
            "use linear or cosine, or set learned_variance to false"
        )
    x0_weight = posterior_weights(levels.alpha, levels.sigma, levels.previous_alpha, levels.previous_sigma)[1]
    mean_error = per_sample(x0_weight, x0) * x0_error
    log_variance = model_log_variance(levels, x0, mix=mix, variance=variance)
    true_log_variance = per_sample(levels.min_log_variance, x0)
    kl = _kl_of_shift(mean_error, true_log_variance, log_variance)
    bits = kl.flatten(1).mean(1) / math.log(2)
    first = levels.previous_sigma == 0
    if first.any():  # a question to the CPU: no device waits
        rows = first.nonzero().squeeze(1).to(x0.device)
        scales = 0.5 * log_variance.expand_as(x0)[rows]
        likelihood = discretized_gaussian_log_likelihood(x0[rows], x0[rows] + mean_error[rows], scales)
        bits = bits.index_copy(0, rows, -likelihood.flatten(1).mean(1) / math.log(2))
    return bits


def model_log_variance(
    levels: LevelBatch,
    like: Float[Tensor, "B C H W"],
    *,
    mix: Float[Tensor, "B C H W"] | None = None,
    variance: Variance = "learned",
) -> Tensor:
    """Log variance of the model's denoising step: `mix` of its two bounds, or one of them (broadcastable to `like`).

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """
    if levels.min_log_variance is None or levels.max_log_variance is None or levels.previous_sigma is None:
        raise ConfigError("a denoising step's variance needs a schedule with discrete steps: linear or cosine")
    low, high = levels.min_log_variance, levels.max_log_variance
    if variance == "learned":
        if mix is None:
            raise ConfigError("variance 'learned' needs a network with learned_variance; choose 'large' or 'small'")
        return per_sample(low, like) + per_sample(high - low, like) * mix
    if variance == "small":
        return per_sample(low, like)
    # PARITY: fixed-large-first. At the cleanest level the released "large" variance is the floor, not beta.
    return per_sample(torch.where(levels.previous_sigma == 0, low, high), like)


def normal_kl(
    mean1: Tensor | float, log_variance1: Tensor | float, mean2: Tensor | float, log_variance2: Tensor | float
) -> Tensor:
    """KL divergence from N(mean1, exp(log_variance1)) to N(mean2, exp(log_variance2)), element by element, in nats."""
    parts = (mean1, log_variance1, mean2, log_variance2)
    like = next(part for part in parts if isinstance(part, Tensor))
    m1, lv1, m2, lv2 = (torch.as_tensor(part, dtype=like.dtype, device=like.device) for part in parts)
    return _kl_of_shift(m1 - m2, lv1, lv2)


def _kl_of_shift(shift: Tensor, log_variance1: Tensor, log_variance2: Tensor) -> Tensor:
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - difference - 1 + shift.square() * torch.exp(-log_variance2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The standard normal distribution function, by the tanh approximation.

    Source: Page 1977, "Approximations to the cumulative normal function", Applied Statistics 26(1).
    """
    # PARITY: tanh-cdf. erf would be exact; the papers' likelihoods are stated with this approximation (error 3e-4).
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability, in nats, of 8-bit values under a normal distribution cut into their 256 bins.

    Args:
        x: values in [-1, 1], a multiple of 2/255 apart; the outermost bins reach to infinity.
        log_scales: log standard deviation.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 13.
    """
    centered, inverse = x - means, torch.exp(-log_scales)
    upper = approx_standard_normal_cdf(inverse * (centered + 1 / 255))
    lower = approx_standard_normal_cdf(inverse * (centered - 1 / 255))
    # PARITY: bin-edges. The outer bins begin at +-0.999, and no probability is taken below 1e-12.
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


class BitsPerDim(NamedTuple):
    """The variational bound of each sample. Columns run from the noisiest level to the cleanest.

    `total` = `prior` + sum of `vb`, all in bits per dimension; `x0_mse` and `eps_mse` are the estimates' errors.
    """

    total: Float[Tensor, "B"]
    prior: Float[Tensor, "B"]
    vb: Float[Tensor, "B T"]
    x0_mse: Float[Tensor, "B T"]
    eps_mse: Float[Tensor, "B T"]


@torch.no_grad()
def bits_per_dim(
    denoise: Denoise,
    x0: Float[Tensor, "B C H W"],
    levels: Sequence[Level],
    *,
    variance: Variance = "learned",
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> BitsPerDim:
    """An upper bound of the bits per dimension that `x0` costs under the chain, one network evaluation per level.

    Args:
        denoise: for 8-bit pixels, with `clip_x0=True`.
        levels: of a schedule with discrete steps, noise first.
        randn_like: one draw per level, noisiest first.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 5.
    """
    noisy = [level for level in levels if level.sigma > 0]
    vb, x0_mse, eps_mse = [], [], []
    for place, level in enumerate(noisy):
        eps = randn_like(x0)
        estimate = denoise(level.alpha * x0 + level.sigma * eps, level)
        here = level_batch(levels, torch.tensor([len(noisy) - 1 - place]).expand(len(x0)))
        vb.append(variational_bound(x0, estimate.x0 - x0, here, mix=estimate.mix, variance=variance))
        x0_mse.append((estimate.x0 - x0).square().flatten(1).mean(1))
        eps_mse.append((estimate.eps - eps).square().flatten(1).mean(1))
    prior = prior_bits(x0, noisy[0])
    bounds = torch.stack(vb, 1)
    return BitsPerDim(prior + bounds.sum(1), prior, bounds, torch.stack(x0_mse, 1), torch.stack(eps_mse, 1))


def prior_bits(x0: Float[Tensor, "B C H W"], noisiest: Level) -> Float[Tensor, "B"]:
    """Bits per dimension by which the noisiest level differs from pure unit noise; no network has a say in it."""
    kl = normal_kl(noisiest.alpha * x0, 2 * math.log(noisiest.sigma), 0.0, 0.0)
    return kl.flatten(1).mean(1) / math.log(2)
