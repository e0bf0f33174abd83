"""Memorisation: do our images lie nearer to training images than new real images do?

A model that has learned the distribution puts its images about as near to the training set as held-out real images
are; one that repeats training images puts them nearer. So does one whose images are less varied than real ones: only
the closest pairs, looked at, tell the two apart.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.neighbours import nearest

QUANTILES = (0.01, 0.1)


@dataclass(frozen=True)
class Share:
    """How many of our images are as near to training images as the nearest real ones are.

    Attributes:
        quantile: which of the real ones: the nearest 1 % or 10 %.
        distance: the largest distance among those.
        share, low, high: of ours within that distance, with an exact 95 % binomial interval. About `quantile` for a
            perfect generator.
        real_share, real_high: of the real ones, ties counted, and the upper end of its interval: with few real images
            the distance itself is uncertain.
    """

    quantile: float
    distance: float
    share: float
    low: float
    high: float
    real_share: float
    real_high: float


@dataclass(frozen=True)
class Pair:
    """One of our images, by its place, and the training image nearest to it."""

    ours: int
    training: int
    distance: float


@dataclass(frozen=True)
class Memorisation:
    """The report.

    Attributes:
        unit: what distances are counted in: a kind of features.
        compared_with: `held-out` real images, or `training` images with their nearest other training image, which
            stands in where nothing was held out.
        median, real_median: of the distances to the nearest training image.
        shares: for each of `QUANTILES`.
        nearest: the closest pairs, closest first.
        verdict: one sentence.
    """

    unit: str
    count: int
    training_count: int
    compared_with: Literal["held-out", "training"]
    compared_count: int
    median: float
    real_median: float
    shares: tuple[Share, ...]
    nearest: tuple[Pair, ...]
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def memorisation(
    ours: FeatureSet, training: FeatureSet, held_out: FeatureSet | None = None, kind: str = "pool", keep: int = 8
) -> Memorisation:
    """The report in feature space: Euclidean distances of one kind of features.

    Args:
        held_out: real images that the model has not seen; None = training images among themselves stand in.
        keep: how many of the closest pairs to name.

    Raises:
        DataError: no such features, features of two widths, or too few images.
    """
    if keep < 0:
        raise ConfigError(f"keep is {keep}; give 0 or more pairs to name")
    rows, seen = ours.rows(kind), training.rows(kind)
    mine, indices = nearest(rows, seen)
    compared_with: Literal["held-out", "training"] = "training" if held_out is None else "held-out"
    if held_out is None:
        real, _ = nearest(seen, seen, same=True)
    else:
        real, _ = nearest(held_out.rows(kind), seen)
    shares = tuple(_share(mine, real, quantile) for quantile in QUANTILES)
    closest = mine.topk(min(keep, len(mine)), largest=False).indices.tolist()
    return Memorisation(
        unit=f"{kind} features",
        count=len(rows),
        training_count=len(seen),
        compared_with=compared_with,
        compared_count=len(real),
        median=mine.median().item(),
        real_median=real.median().item(),
        shares=shares,
        nearest=tuple(Pair(i, int(indices[i]), mine[i].item()) for i in closest),
        verdict=_verdict(shares, compared_with),
    )


def pixel_distances(
    images: Tensor, training: Tensor, *, same: bool = False
) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
    """RMS difference in grey levels (0 to 255) of each image to its nearest training image, and which that is.

    Blind to a copy that is shifted or recoloured; features are there for those.

    Args:
        images, training: uint8 (N, 3, H, W) and (M, 3, H, W).
        same: both are one set, and no image counts as its own neighbour.

    Raises:
        DataError: images that are not 8-bit RGB, of two sizes, or too few.
    """
    distances, indices = nearest(_flat(images), _flat(training), same=same)
    return distances / math.sqrt(math.prod(images.shape[1:])), indices


def _flat(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"expected 8-bit RGB images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return images.flatten(1)


def _share(mine: Tensor, real: Tensor, quantile: float) -> Share:
    place = max(1, math.ceil(quantile * len(real)))
    distance = real.kthvalue(place).values.item()
    # Rounding must not part equal distances: copies of training images lie at 0, and so may duplicates among those.
    within = distance * (1 + 1e-9)
    near, real_near = int((mine <= within).sum()), int((real <= within).sum())
    low, high = binomial_interval(near, len(mine))
    return Share(
        quantile=quantile,
        distance=distance,
        share=near / len(mine),
        low=low,
        high=high,
        real_share=real_near / len(real),
        real_high=binomial_interval(real_near, len(real))[1],
    )


def _verdict(shares: tuple[Share, ...], compared_with: str) -> str:
    real = "held-out images" if compared_with == "held-out" else "training images among themselves"
    for s in shares:
        if s.low > s.real_high:
            return (
                f"Nearer to training images than {real}: {s.share:.1%} of ours ({s.low:.1%} to {s.high:.1%}) are as "
                f"near as the nearest {s.real_share:.1%} of those; copies, or less varied than real images: the "
                "closest pairs show which."
            )
    widest = shares[-1]
    if widest.high < widest.quantile:
        return (
            f"No sign of memorisation: ours lie farther from training images than {real} do ({widest.share:.1%} within "
            f"the distance of their nearest {widest.real_share:.1%})."
        )
    return (
        f"No sign of memorisation: {widest.share:.1%} of ours ({widest.low:.1%} to {widest.high:.1%}) are as near to a "
        f"training image as the nearest {widest.real_share:.1%} of {real}."
    )


def binomial_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share: the values that a two-sided test of the count would not reject.

    Raises:
        ValueError: successes are not in 0 to trials, or there is no trial.

    Source: Clopper & Pearson 1934, Biometrika 26, 404.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is no share; give 0 <= successes <= trials, and at least one trial")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _solve(lambda p: 1 - _at_most(successes - 1, trials, p), tail)
    high = 1.0 if successes == trials else _solve(lambda p: 1 - _at_most(successes, trials, p), 1 - tail)
    return low, high


def _solve(rising: Callable[[float], float], target: float) -> float:
    """Where a function that rises over 0 to 1 meets a value."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


def _at_most(successes: int, trials: int, share: float) -> float:
    """Probability of at most so many successes."""
    if share <= 0 or share >= 1:
        return float(share <= 0 or successes >= trials)
    count = torch.arange(successes + 1, dtype=torch.float64)
    ways = math.lgamma(trials + 1) - torch.lgamma(count + 1) - torch.lgamma(trials - count + 1)
    return (ways + count * math.log(share) + (trials - count) * math.log1p(-share)).exp().sum().item()
