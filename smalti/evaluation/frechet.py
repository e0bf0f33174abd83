"""Frechet distance between two Gaussians: FID, sFID, and the same distance on any features.

The distance is |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2). With S1 = E E^T and S2 = F F^T the last trace is the
sum of the singular values of E^T F, real and right to 1e-14 of the traces at any rank. S1 S2 itself, whose root other
tools take, has their squares for eigenvalues, and the root of what rounding leaves of a small square is wrong by 1e-8
of the largest: where variances fall steeply that adds up to 1e-6 of the traces, far more of a small distance.

Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6; Nash et al. 2021, arXiv:2103.03841 (sFID).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import GROUPS, Family, Metric, Values, compared_with, refuse_other_width
from smalti.evaluation.moments import Moments

AXES = 64
PAPER_COUNT = 50_000
FORMULA = "|m1 - m2|^2 + tr(S1 + S2) - 2 tr sqrt(S1 S2); covariances divide by n - 1; float64, exact root"
_ROWS = 4096  # converted to float64 at once


@dataclass(frozen=True, eq=False)
class Target:
    """The reference of a Frechet distance, prepared once for many distances to it.

    Attributes:
        trace: of the covariance.
        factor: F with F F^T = covariance + epsilon; as many columns as that has rank.
    """

    mean: Float[Tensor, "D"]
    trace: float
    factor: Float[Tensor, "D R"]
    epsilon: float = 0.0

    @staticmethod
    def of(reference: Moments, *, epsilon: float = 0.0) -> "Target":
        """Prepare `reference`; the work of one eigendecomposition."""
        factor = _factor(_lifted(reference.covariance, epsilon))
        return Target(reference.mean, float(reference.covariance.trace()), factor, epsilon)

    def distance(self, ours: Moments, *, quick: bool = False) -> float:
        """Frechet distance of `ours` from this reference.

        Args:
            quick: from the squares, in a quarter of the time; off by up to 1e-6 of the traces. For uncertainties.
        """
        covariance = _lifted(ours.covariance, self.epsilon)
        if quick:
            overlap = _trace_of_root(self.factor.T @ covariance @ self.factor)  # (R, R)
        else:
            overlap = float(torch.linalg.svdvals(_factor(covariance).T @ self.factor).sum())
        return _sum(ours.mean - self.mean, float(ours.covariance.trace()) + self.trace, overlap)


def frechet_distance(ours: Moments, reference: Moments, *, epsilon: float = 0.0) -> float:
    """Squared 2-Wasserstein distance between the Gaussians with these moments; at least 0.

    Args:
        epsilon: added to the diagonals of both covariances inside the root only. The ADM suite adds 1e-6 when its
            square root of the product is not finite, and whether that happens to singular covariances depends on the
            version of scipy: 1.10 fails on a feature that never changes, 1.17 does not. Factors never fail, so the
            default is the exact distance, which every version of the suite computes where the covariances are
            regular; 1e-6 reproduces the number of a suite that took the other path.

    Raises:
        DataError: the two have different numbers of features.
    """
    refuse_other_width(len(ours.mean), len(reference.mean))
    return Target.of(reference, epsilon=epsilon).distance(ours)


def distances_of_unions(
    ours: FeatureSet,
    kind: str,
    groups: Int[Tensor, "N"],
    unions: Sequence[Iterable[int]],
    reference: Moments,
) -> list[float]:
    """Frechet distance from the reference of several selections of our images, each a union of groups.

    The first is a number in its own right; the others, taken the quick way, say how it changes.

    With fewer images than features everything is done between images instead, and the matrices are as small as that.
    """
    rows = ours.rows(kind)
    refuse_other_width(rows.shape[1], len(reference.mean))
    if len(rows) < rows.shape[1]:
        few = _Few.of(rows, reference)
        return [few.distance(torch.isin(groups, torch.tensor(list(union)))) for union in unions]
    target = Target.of(reference)
    first, *others = map(frozenset, unions)
    everything = set(groups.unique().tolist()) <= first
    whole = Moments.of(rows if everything else rows[torch.isin(groups, torch.tensor(list(first)))])
    # The exact distance takes the most room, so it comes before the ten groups, 32 MiB each at 2048 features.
    distances = [target.distance(whole)]
    if not others:
        return distances
    parts = {g: Moments.of(rows[groups == g]) for g in groups.unique().tolist()}
    merged = {first: whole}
    for place, union in enumerate(others):
        # Taking a group away is less work than putting nine together, which takes as long as the distance itself.
        larger = next((known for known in merged if _one_more(known, union)), None)
        if larger is None:
            left = Moments.merged(parts[g] for g in union)
        else:
            left = merged[larger].without(parts[next(iter(larger - union))])
        # Only what is still to be taken from is kept.
        merged[union] = left
        merged = {known: m for known, m in merged.items() if any(_one_more(known, u) for u in others[place + 1 :])}
        distances.append(target.distance(left, quick=True))
    return distances


def _one_more(larger: frozenset[int], union: frozenset[int]) -> bool:
    return union < larger and len(larger) == len(union) + 1


def leave_out_unions() -> list[list[int]]:
    """All groups, then all but each one in turn."""
    return [list(range(GROUPS)), *([g for g in range(GROUPS) if g != out] for out in range(GROUPS))]


@dataclass(frozen=True, eq=False)
class _Few:
    """Images fewer than features: S1 S2 has the eigenvalues of X S2 X^T / (n - 1), X the centred rows, and zeros."""

    rows: Tensor  # (N, D) float64, about their common mean
    offset: Tensor  # (D,) of that mean from the reference's
    gram: Tensor  # (N, N) X S2 X^T
    trace: float  # of S2

    @staticmethod
    def of(rows: Tensor, reference: Moments) -> "_Few":
        mean = rows.double().mean(dim=0)
        away = rows.double() - mean
        gram = away @ reference.covariance @ away.T
        return _Few(away, mean - reference.mean, gram, float(reference.covariance.trace()))

    def distance(self, chosen: Tensor) -> float:
        rows, n = self.rows[chosen], int(chosen.sum())
        shift = rows.mean(dim=0)
        gram = self.gram[chosen][:, chosen]
        gram = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()  # about the mean of the chosen
        own = float((rows - shift).square().sum()) / (n - 1)
        return _sum(self.offset + shift, own + self.trace, _trace_of_root(gram / (n - 1)))


def _sum(gap: Tensor, traces: float, overlap: float) -> float:
    return max(0.0, float(gap.square().sum()) + traces - 2 * overlap)


def _factor(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D R"]:
    """F with F F^T = covariance, a column for each direction in which there is any variance."""
    values, vectors = torch.linalg.eigh(covariance)
    known = _known(values)
    return vectors[:, known] * values[known].sqrt()


def _trace_of_root(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[_known(values)].sqrt().sum())


def _known(values: Tensor) -> Tensor:
    """Which of the ascending eigenvalues rise above rounding.

    A root makes 1e-8 of the 1e-16 that rounding leaves of a 0, and a thousand of those would show.
    """
    return values > 4 * torch.finfo(values.dtype).eps * values[-1:].clamp_min(0)


def _lifted(covariance: Tensor, epsilon: float) -> Tensor:
    return covariance + epsilon * torch.eye(len(covariance), dtype=covariance.dtype) if epsilon else covariance


# What the table of metrics needs.


def _family(kind: str, names: tuple[str, ...]) -> Family:
    def family(ours: FeatureSet, reference: FeatureSet | None, groups: Tensor | None) -> Mapping[str, Values]:
        real = compared_with(reference).moments(kind)
        if groups is None or kind in ours.stated:
            values = Values(_distance_of(ours, kind, real))
        else:
            value, *without = distances_of_unions(ours, kind, groups, leave_out_unions(), real)
            values = Values(value, tuple(without))
        return dict.fromkeys(names, values)

    return family


def _distance_of(ours: FeatureSet, kind: str, real: Moments) -> float:
    if kind in ours.stated:
        return frechet_distance(ours.moments(kind), real)
    rows = ours.rows(kind)
    if len(rows) < 2:
        raise DataError(f"{len(rows)} images have no covariance; give at least 2")
    if len(rows) >= rows.shape[1]:
        return frechet_distance(ours.moments(kind), real)
    return distances_of_unions(ours, kind, torch.zeros(len(rows), dtype=torch.int64), [[0]], real)[0]


def _pca_family(ours: FeatureSet, reference: FeatureSet | None, groups: Tensor | None) -> Mapping[str, Values]:
    """Frechet distance along the leading principal axes of the reference; all of them where there are fewer."""
    real = compared_with(reference).moments("pool")
    number = min(AXES, len(real.mean))
    if real.count is not None and real.count <= number:
        raise DataError(f"{number} principal axes need at least {number + 1} reference images, this has {real.count}")
    axes = torch.linalg.eigh(real.covariance).eigenvectors[:, -number:]  # (D, 64)
    target = _along(real, axes)
    if "pool" in ours.stated:
        own = ours.moments("pool")
        refuse_other_width(len(own.mean), len(real.mean))
        return {"fd_pca64": Values(frechet_distance(_along(own, axes), target))}
    refuse_other_width(ours.rows("pool").shape[1], len(axes))
    rows = torch.cat([part.double() @ axes for part in ours.rows("pool").split(_ROWS)])
    if groups is None:
        return {"fd_pca64": Values(frechet_distance(Moments.of(rows), target))}
    value, *without = distances_of_unions(FeatureSet({"pool": rows}), "pool", groups, leave_out_unions(), target)
    return {"fd_pca64": Values(value, tuple(without))}


def _along(moments: Moments, axes: Tensor) -> Moments:
    return Moments(moments.count, moments.mean @ axes, axes.T @ moments.covariance @ axes)


def count_and_width(images: FeatureSet, kind: str) -> tuple[int | None, int]:
    """How many images stand behind the moments of a kind, None if nobody says, and how many features each has."""
    if kind in images.stated:
        return images.stated[kind].count, len(images.stated[kind].mean)
    rows = images.rows(kind)
    return len(rows), rows.shape[1]


def too_few(
    kind: str, *, paper_count: int | None = None, axes: int | None = None
) -> Callable[[FeatureSet, FeatureSet | None], str]:
    """The caution of a Frechet distance: fewer images than features on either side, or than papers take."""
    what, other = ("features", "kid or fd_pca64") if axes is None else ("axes", "kid")

    def caution(ours: FeatureSet, reference: FeatureSet | None) -> str:
        lines = []
        count, width = count_and_width(ours, kind)
        width = width if axes is None else min(axes, width)
        sides = [("", count)]
        if reference is not None:
            sides.append(("reference ", count_and_width(reference, kind)[0]))
        if few := [f"{n:,} {who}images" for who, n in sides if n is not None and n <= width]:
            lines.append(
                f"{' and '.join(few)} for {width:,} {what}: no covariance of full rank, so the distance is too large; "
                f"compare at equal counts only, or use {other}"
            )
        if paper_count is not None and count is not None and count != paper_count:
            lines.append(f"papers take {paper_count:,} images, these are {count:,}: the fewer, the larger the distance")
        return "; ".join(lines)

    return caution


_of_pool = _family("pool", ("fid", "fd"))

FID = Metric(
    label="FID",
    better="lower",
    needs=("pool",),
    reference="moments",
    family=_of_pool,
    definition=f"Frechet distance of pool features: {FORMULA}",
    network="inception",
    bounds=(0, math.inf),
    caution=too_few("pool", paper_count=PAPER_COUNT),
)
SFID = Metric(
    label="sFID",
    better="lower",
    needs=("spatial",),
    reference="moments",
    family=_family("spatial", ("sfid",)),
    definition=f"Frechet distance of spatial features: {FORMULA}",
    network="inception",
    bounds=(0, math.inf),
    caution=too_few("spatial", paper_count=PAPER_COUNT),
)
FD = Metric(
    label="FD",
    better="lower",
    needs=("pool",),
    reference="moments",
    family=_of_pool,
    definition=f"Frechet distance of pool features: {FORMULA}",
    bounds=(0, math.inf),
    caution=too_few("pool"),
)
FD_PCA64 = Metric(
    label="FD-PCA64",
    better="lower",
    needs=("pool",),
    reference="moments",
    family=_pca_family,
    definition=f"Frechet distance along the {AXES} leading principal axes of the reference's pool features: {FORMULA}",
    bounds=(0, math.inf),
    caution=too_few("pool", axes=AXES),
)
