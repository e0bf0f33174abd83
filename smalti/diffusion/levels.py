"""Noise levels, and the three schedules that make them: all that samplers and objectives know of a diffusion process.

Everything here is float64 and lives on the CPU: levels are few, and a schedule rounded to float32 loses digits exactly
where `1 - alpha**2` is small. Time runs from 0 (clean) to noise, for flow matching too.
"""

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.config import did_you_mean
from smalti.diffusion.spacing import spaced_indices
from smalti.errors import ConfigError

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Level:
    """One noise level: `x_t = alpha * x0 + sigma * eps`, with `eps` of unit variance.

    Args:
        timestep: what the backbone is told; the index of the training schedule (also after respacing), or 1000 t.
        alpha: signal scale, 0 to 1; its square is the papers' alpha-bar.
        sigma: noise scale, 0 to 1.
    """

    timestep: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """`log(alpha**2 / sigma**2)`; minus infinity for pure noise, plus infinity for clean latents."""
        if self.alpha == 0:
            return -math.inf
        if self.sigma == 0:
            return math.inf
        return 2 * (math.log(self.alpha) - math.log(self.sigma))


CLEAN = Level(timestep=0.0, alpha=1.0, sigma=0.0)


@dataclass(frozen=True, eq=False)
class LevelBatch:
    """The level of each sample of a training batch, float64 on the CPU.

    The last four exist for schedules with discrete steps only; the variational bound needs them.

    Args:
        previous_alpha, previous_sigma: the next cleaner level of the chain; 1 and 0 below the cleanest.
        min_log_variance: log variance of `q(x_previous | x_t, x0)`. At the cleanest level that variance is 0, and the
            value of the level above stands in for it.
        max_log_variance: log variance of `q(x_t | x_previous)`, the papers' log beta.
    """

    timesteps: Float[Tensor, "B"]
    alpha: Float[Tensor, "B"]
    sigma: Float[Tensor, "B"]
    previous_alpha: Float[Tensor, "B"] | None = None
    previous_sigma: Float[Tensor, "B"] | None = None
    min_log_variance: Float[Tensor, "B"] | None = None
    max_log_variance: Float[Tensor, "B"] | None = None


class Posterior(NamedTuple):
    """`q(x_s | x_t, x0)` is normal with mean `x_t_weight * x_t + x0_weight * x0`; floats, or one value per sample."""

    x_t_weight: float
    x0_weight: float
    variance: float


def step_variance(alpha: Number, sigma: Number, cleaner_alpha: Number, cleaner_sigma: Number) -> Number:
    """Variance that one noising step adds between two levels; beta where `alpha**2 + sigma**2 = 1`.

    Source: Kingma et al. 2021, arXiv:2107.00630, eq. 20.
    """
    return sigma**2 - (alpha / cleaner_alpha) ** 2 * cleaner_sigma**2


def posterior_weights(
    alpha: Number, sigma: Number, cleaner_alpha: Number, cleaner_sigma: Number
) -> tuple[Number, Number, Number]:
    """`(weight of x_t, weight of x0, variance)` of `q(x_cleaner | x_t, x0)`, for any pair of levels.

    Source: Ho et al. 2020, arXiv:2006.11239, eq. 7; Kingma et al. 2021, arXiv:2107.00630, appendix A.2.
    """
    added = step_variance(alpha, sigma, cleaner_alpha, cleaner_sigma)
    x_t_weight = alpha / cleaner_alpha * cleaner_sigma**2 / sigma**2
    return x_t_weight, cleaner_alpha * added / sigma**2, added * cleaner_sigma**2 / sigma**2


def posterior(now: Level, cleaner: Level) -> Posterior:
    """`q(x_cleaner | x_now, x0)` as plain numbers, for samplers."""
    return Posterior(*posterior_weights(now.alpha, now.sigma, cleaner.alpha, cleaner.sigma))


def level_batch(levels: Sequence[Level], indices: Int[Tensor, "B"]) -> LevelBatch:
    """The levels at the given places of a chain.

    Args:
        levels: noise first, `CLEAN` last, as schedules and samplers use them.
        indices: counted from the clean end: 0 is the cleanest noisy level, as in the papers.

    Raises:
        ConfigError: an index is outside the chain.
    """
    noisy = [level for level in reversed(levels) if level.sigma > 0]
    columns = torch.tensor([(level.timestep, level.alpha, level.sigma) for level in noisy], dtype=torch.float64)
    timesteps, alpha, sigma = columns.unbind(1)
    return _gather(timesteps, alpha, sigma, indices.cpu())


def _gather(timesteps: Tensor, alpha: Tensor, sigma: Tensor, indices: Tensor) -> LevelBatch:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(alpha):
        raise ConfigError(
            f"level indices {int(indices.min())}..{int(indices.max())} are outside the {len(alpha)} noisy levels "
            f"of this chain; use 0 to {len(alpha) - 1}"
        )
    cleaner_alpha = torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]])
    cleaner_sigma = torch.cat([torch.zeros_like(sigma[:1]), sigma[:-1]])
    added = step_variance(alpha, sigma, cleaner_alpha, cleaner_sigma)
    variance = posterior_weights(alpha, sigma, cleaner_alpha, cleaner_sigma)[2]
    # PARITY: log-variance-floor. The cleanest level's posterior variance is 0; the released tables log the next one.
    floor = variance[1:2] if len(variance) > 1 else added[:1]
    low = torch.cat([floor, variance[1:]]).log()
    columns = (timesteps, alpha, sigma, cleaner_alpha, cleaner_sigma, low, added.log())
    return LevelBatch(*(column[indices] for column in columns))


class Schedule(abc.ABC):
    """A path from clean latents to noise. Samplers see the levels that it lists, training the levels that it draws."""

    name: str
    num_train_timesteps: int

    @abc.abstractmethod
    def levels(self, num_inference_steps: int, *, spacing: str = "default", shift: float = 1.0) -> list[Level]:
        """`num_inference_steps` noisy levels, noise first, then `CLEAN`.

        Args:
            spacing: which levels of the path are visited; the subclasses list theirs.
            shift: above 1 moves flow levels towards noise; discrete schedules know 1 only.

        Raises:
            ConfigError: this schedule has no such spacing, or not that many levels.
        """

    @abc.abstractmethod
    def at(self, uniforms: Float[Tensor, "B"]) -> LevelBatch:
        """Levels for training, from numbers in [0, 1): 0 is the clean end of the path, equal parts equally likely."""


class DiscreteSchedule(Schedule):
    """A chain of `num_train_timesteps` levels given by its step variances (beta), with `alpha**2 + sigma**2 = 1`.

    The spacings of its `levels` stand in spacing.py; `respaced` is the default.
    """

    def __init__(self, name: str, betas: Float[Tensor, "T"]) -> None:
        self.name = name
        self.num_train_timesteps = len(betas)
        self._timesteps = torch.arange(len(betas), dtype=torch.float64)
        self._alpha_bar = torch.cumprod(1 - betas, dim=0)
        self._alpha, self._sigma = self._alpha_bar.sqrt(), (1 - self._alpha_bar).sqrt()

    def levels(self, num_inference_steps: int, *, spacing: str = "default", shift: float = 1.0) -> list[Level]:
        if shift != 1:
            raise ConfigError(
                f"shift {shift} moves flow levels only; schedule {self.name!r} has none, so leave it at 1"
            )
        if not 1 <= num_inference_steps <= self.num_train_timesteps:
            raise ConfigError(
                f"num_inference_steps {num_inference_steps} is not possible: schedule {self.name!r} has "
                f"{self.num_train_timesteps} levels; use 1 to {self.num_train_timesteps}"
            )
        indices = spaced_indices(2 * (self._alpha.log() - self._sigma.log()), num_inference_steps, spacing)
        kept = self._alpha_bar[indices]
        # PARITY: respaced-product. The released chain takes betas from the kept alpha-bars and multiplies them up
        # again, which costs digits (1e-11 at the end of the cosine schedule).
        betas = 1 - kept / torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
        alpha_bar = torch.cumprod(1 - betas, dim=0).tolist()
        pairs = list(zip(indices, alpha_bar, strict=True))
        return [Level(float(i), math.sqrt(a), math.sqrt(1 - a)) for i, a in reversed(pairs)] + [CLEAN]

    def at(self, uniforms: Float[Tensor, "B"]) -> LevelBatch:
        indices = (uniforms.cpu().double() * self.num_train_timesteps).long()
        return _gather(self._timesteps, self._alpha, self._sigma, indices.clamp_(max=self.num_train_timesteps - 1))


class FlowSchedule(Schedule):
    """The straight path `alpha = 1 - t, sigma = t`, continuous in t; the backbone is told `num_train_timesteps * t`.

    Spacing of `levels`: uniform in t (default), from t = 1, where no signal is left, to 0. `shift` maps t to
    `shift t / (1 + (shift - 1) t)`, which spends more steps near noise, as larger images need.

    Source: Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003; shift: Esser et al. 2024,
    arXiv:2403.03206, eq. 23.
    """

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.name = "flow"
        self.num_train_timesteps = num_train_timesteps

    def levels(self, num_inference_steps: int, *, spacing: str = "default", shift: float = 1.0) -> list[Level]:
        if spacing not in ("default", "uniform"):
            raise ConfigError(f"schedule 'flow' has no spacing {spacing!r}; choose 'uniform'")
        if num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if not 0 < shift < math.inf:
            raise ConfigError(f"shift must be above 0 (1 = none, 3 suits 512-pixel images), got {shift}")
        times = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        times = [shift * t / (1 + (shift - 1) * t) for t in times]
        return [Level(self.num_train_timesteps * t, 1 - t, t) for t in times] + [CLEAN]

    def at(self, uniforms: Float[Tensor, "B"]) -> LevelBatch:
        # At t = 0 exactly there is no noise, and x0 prediction would say nothing about eps.
        t = uniforms.cpu().double().clamp(min=2.0**-54)
        return LevelBatch(self.num_train_timesteps * t, 1 - t, t)


def _linear(num_train_timesteps: int) -> Schedule:
    """Source: Ho et al. 2020, arXiv:2006.11239, sec. 4 (1e-4 to 0.02 for 1000 steps), scaled to other lengths."""
    scale = 1000 / num_train_timesteps
    if num_train_timesteps < 21:
        raise ConfigError(
            f"schedule 'linear' needs at least 21 timesteps (beta stays below 1), got {num_train_timesteps}"
        )
    return DiscreteSchedule(
        "linear", torch.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps, dtype=torch.float64)
    )


def _cosine(num_train_timesteps: int) -> Schedule:
    """Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; beta at most 0.999."""
    u = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return DiscreteSchedule("cosine", (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))


SCHEDULES: dict[str, Callable[[int], Schedule]] = {"linear": _linear, "cosine": _cosine, "flow": FlowSchedule}


def build_schedule(name: str, num_train_timesteps: int = 1000) -> Schedule:
    """A schedule from its name in `SCHEDULES`.

    Args:
        num_train_timesteps: length of a discrete chain; for flow, the timestep told to the backbone at t = 1.

    Raises:
        ConfigError: unknown name, or too few timesteps.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}{did_you_mean(name, SCHEDULES)}")
    if num_train_timesteps < 2:
        raise ConfigError(f"num_train_timesteps must be at least 2, got {num_train_timesteps}")
    return SCHEDULES[name](num_train_timesteps)
