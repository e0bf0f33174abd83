"""Inception Score: how sure the classifier is of each image, and how different the images are.

Source: Salimans et al. 2016, arXiv:1606.03498, sec. 4; the ADM suite's rule of splits.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import GROUPS, Metric, Values

SPLIT = 5000


def inception_score(logits: Float[Tensor, "N K"], *, split_size: int = SPLIT) -> float:
    """Mean over consecutive splits of exp(mean KL(p_i || mean p)); 1 to the number of classes, higher is better.

    Args:
        logits: before the softmax and without the classifier's bias, as the suite takes them.
        split_size: images of each split; the last one is shorter and counts as much as the others.

    Raises:
        ConfigError: `split_size` is below 1.
        DataError: there is no image.
    """
    if split_size < 1:
        raise ConfigError(f"a split has at least 1 image, got split_size {split_size}")
    if not len(logits):
        raise DataError("the Inception Score of no image is not a number; give some")
    scores = []
    for rows in logits.split(split_size):
        log_p = rows.double().log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(rows))  # finite where a mean of probabilities underflows
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp()))
    # PARITY: short-split. The last split, shorter and so lower in score, weighs as much as the others.
    return sum(scores) / len(scores)


def _family(ours: FeatureSet, reference: FeatureSet | None, groups: Tensor | None) -> Mapping[str, Values]:
    logits = ours.rows("logits")
    without = () if groups is None else _without_each(logits, groups)
    return {"inception_score": Values(inception_score(logits), without)}


def _without_each(logits: Float[Tensor, "N K"], groups: Int[Tensor, "N"]) -> tuple[float, ...]:
    """The scores without each group in turn, from one pass over the images, as mean(p log p) - mean p log mean p.

    Every image stays in its split. Were the rest cut anew, a last split of a few images could come or go, and what that
    does to the score is no uncertainty: errors came out four times too large for 5,560 images, too small for 11,000.
    """
    total, splits = torch.zeros(GROUPS, dtype=torch.float64), 0
    for rows, of in zip(logits.split(SPLIT), groups.split(SPLIT), strict=True):
        log_p = rows.double().log_softmax(dim=1)
        p = log_p.exp()
        member = torch.nn.functional.one_hot(of, GROUPS).double().T  # (10, rows)
        # What is left without each group; a split that is one group has nothing else and stays.
        rest = torch.where(member.sum(dim=1, keepdim=True) < len(rows), 1 - member, 1)
        counts = rest.sum(dim=1)
        means = rest @ p / counts[:, None]
        total += (rest @ log_p.mul_(p).sum(dim=1) / counts - torch.xlogy(means, means).sum(dim=1)).exp()
        splits += 1
    return tuple((total / splits).tolist())


def _caution(ours: FeatureSet, reference: FeatureSet | None) -> str:
    count = len(ours.rows("logits"))
    if count >= SPLIT:
        return ""
    return f"{count:,} images do not fill a split of {SPLIT:,}, which makes the score too low"


INCEPTION_SCORE = Metric(
    label="Inception Score",
    better="higher",
    needs=("logits",),
    reference="nothing",
    family=_family,
    definition=(
        f"mean over consecutive splits of {SPLIT} images, the last one shorter, of exp(mean KL(p_i || mean p)); "
        "p = softmax of the logits without bias; float64"
    ),
    network="inception",
    bounds=(1, math.inf),
    caution=_caution,
    ordered=True,
)
