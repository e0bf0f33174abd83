"""The lines to beat: the best constant and the best linear denoiser, in closed form, on the same triples.

Until a network's loss is below that of the linear denoiser, it has only learned a filter.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.data.examples import Examples
from smalti.diffusion.prediction import add_noise, x0_weights
from smalti.training.validation import StrataLoss, Triples, by_stratum

MAX_EXAMPLES, MAX_VALUES = 4096, 2**28
SHRINKAGE = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Baselines:
    """Losses of denoisers that know the training set's mean, or its mean and covariance, and nothing else.

    Args:
        shrinkage: share of the mean variance mixed into the covariance, per stratum; see `linear_denoiser_loss`.
    """

    constant: StrataLoss
    linear: StrataLoss
    shrinkage: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean of the training examples, and the principal axes of their covariance with the variance along each."""

    mean: Float[Tensor, "P"]
    axes: Float[Tensor, "P R"]
    variances: Float[Tensor, "R"]


def example_moments(examples: Examples, indices: list[int]) -> Moments:
    """Float64 moments of at most 4096 examples, by way of the smaller of covariance and Gram matrix."""
    count = min(MAX_EXAMPLES, MAX_VALUES // math.prod(examples.sample_shape))
    stride = -(-len(indices) // max(2, count))
    x = examples.x0(indices[::stride]).flatten(1).double()
    mean = x.mean(0)
    centred = (x - mean) / max(1, len(x) - 1) ** 0.5
    tall = centred.shape[0] > centred.shape[1]
    variances, vectors = torch.linalg.eigh(centred.T @ centred if tall else centred @ centred.T)
    keep = variances > variances[-1] * 1e-12  # the mean took one dimension away, and twins others
    variances, vectors = variances[keep], vectors[:, keep]
    return Moments(mean, vectors if tall else centred.T @ vectors / variances.sqrt(), variances)


def baselines(moments: Moments, triples: Triples, prediction: str) -> Baselines:
    """Both lines for one set of triples."""
    deviation = triples.x0.flatten(1).double() - moments.mean
    constant = by_stratum(deviation.square().mean(1) * _target_scale(triples, prediction), triples)
    linear, shrinkage = linear_denoiser_loss(moments, triples, prediction)
    return Baselines(constant, linear, shrinkage)


def linear_denoiser_loss(moments: Moments, triples: Triples, prediction: str) -> tuple[StrataLoss, tuple[float, ...]]:
    """Loss of the Wiener filter, `x0 = mean + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mean)`.

    With fewer images than pixels the sample covariance C says that most directions never vary, and held-out images do.
    So C is mixed with the identity times its mean variance; of a dozen mixing shares the best for each stratum *on
    these very triples* is taken, which flatters the filter, not the network.

    Returns:
        The loss, and the mixing share that each stratum took.
    """
    x_t = add_noise(triples.x0, triples.eps, triples.levels).flatten(1).double()
    alpha, sigma = triples.levels.alpha[:, None], triples.levels.sigma[:, None]
    seen, wanted = x_t - alpha * moments.mean, triples.x0.flatten(1).double() - moments.mean  # (N, P)
    seen_along, wanted_along = seen @ moments.axes, wanted @ moments.axes  # (N, R)
    # What lies across the axes is only scaled, so three sums tell its error for any mixing share.
    seen_across = seen.square().sum(1) - seen_along.square().sum(1)
    wanted_across = wanted.square().sum(1) - wanted_along.square().sum(1)
    shared_across = (seen * wanted).sum(1) - (seen_along * wanted_along).sum(1)
    scale = _target_scale(triples, prediction)
    average = moments.variances.sum() / moments.mean.numel()
    losses = []
    for share in SHRINKAGE:
        variances = (1 - share) * moments.variances + share * average
        gains = alpha * variances / (alpha**2 * variances + sigma**2)
        rest = (alpha * share * average / (alpha**2 * share * average + sigma**2))[:, 0]
        errors = (gains * seen_along - wanted_along).square().sum(1)
        errors += rest**2 * seen_across - 2 * rest * shared_across + wanted_across
        losses.append(by_stratum(errors / x_t.shape[1] * scale, triples))
    best = [min(range(len(SHRINKAGE)), key=lambda i: losses[i].strata[k]) for k in range(len(losses[0].strata))]
    strata = tuple(losses[i].strata[k] for k, i in enumerate(best))
    sizes = [int((triples.strata == k).sum()) for k in range(len(strata))]
    mean = sum(loss * size for loss, size in zip(strata, sizes, strict=True)) / len(triples)
    return StrataLoss(mean, strata), tuple(SHRINKAGE[i] for i in best)


def _target_scale(triples: Triples, prediction: str) -> Float[Tensor, "N"]:
    """What turns a squared error of x0 into that of the prediction target, because x_t is known."""
    return x0_weights(prediction, triples.levels.alpha, triples.levels.sigma)[1].double() ** -2
