"""Precision and recall, density and coverage: are our images among the real ones, and the real ones among ours?

An image is among others when it lies in a ball around one of them that reaches to its k-th nearest neighbour.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float16, Int
from torch import Tensor

from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import GROUPS, Metric, Values, compared_with, refuse_other_width
from smalti.evaluation.neighbours import TOO_LARGE, Arithmetic, Exact, Points, neighbour_radii, tiles

_HALF_MAX = 65504.0
SOME = 200  # real images on which float16 is looked at
COARSE = 0.01  # of a squared distance: on Gaussians, precision is then off by 0.02; lite0's features: 0.0004
_T = TypeVar("_T")

PRECISION_RECALL = (
    "k = 3 nearest others, pool features, balls closed, squared distances |u|^2 - 2uv + |v|^2 rounded to float16 after "
    "each step as the ADM suite does, in float32 where one of them is not finite"
)
DENSITY_COVERAGE = "k = 5 nearest others among the real images, pool features, balls open, distances in float64"


def precision_recall(
    ours: FeatureSet,
    reference: FeatureSet | None,
    groups: Int[Tensor, "N"] | None = None,
    *,
    rule: str = "suite",
    k: int = 3,
) -> Mapping[str, Values]:
    """Share of our images inside a ball around some real one, and the reverse.

    A ball reaches from an image to the k-th nearest other image of its own set.

    Args:
        groups: of each of our images; with them, both numbers also without each group, whose images then neither count
            nor have a ball nor bound one.
        rule: "suite" rounds as published numbers are rounded; "exact" is float64.

    Raises:
        ConfigError: an unknown rule.
        DataError: too few images for k neighbours, or features of two widths.

    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, sec. 2; the arithmetic is that of the ADM evaluation suite.
    """
    if rule not in ("suite", "exact"):
        raise ConfigError(f"there is no rule {rule!r} for precision and recall; choose suite or exact")
    mine, real, sizes = _sorted_by_group(ours, reference, groups)
    by = sizes if groups is not None else None
    if rule == "exact":
        arithmetic = Exact.around(real)
        a, b = arithmetic.points(real), arithmetic.points(mine)
        real_radii, my_radii = neighbour_radii(arithmetic, a, k), neighbour_radii(arithmetic, b, k, by)
        # Ties are real: a real image may be among ours, and then a distance is a radius. Rounding must not part them.
        real_radii = (real_radii + arithmetic.slack(a, real_radii))[:, 0]
        inside, covered = _inside(arithmetic, a, real_radii, b, my_radii + arithmetic.slack(b, my_radii), sizes)
    else:
        suite = _suite_points(real), _suite_points(mine)
        real_radii = _in_half_or_single(suite[:1], lambda how, p: neighbour_radii(how, p[0], k))[:, 0]
        my_radii = _in_half_or_single(suite[1:], lambda how, p: neighbour_radii(how, p[0], k, by))
        inside, covered = _in_half_or_single(
            suite, lambda how, p: _inside(how, p[0], real_radii, p[1], my_radii, sizes)
        )
    recall = covered.double().mean(dim=0).tolist()
    return {
        "precision": _mean_by_group(inside, sizes if groups is not None else None),
        "recall": Values(recall[0], tuple(recall[1:])),
    }


def density_coverage(
    ours: FeatureSet, reference: FeatureSet | None, groups: Int[Tensor, "N"] | None = None, *, k: int = 5
) -> Mapping[str, Values]:
    """How many real images' balls hold one of ours, over k, and the share of real images whose ball holds one of ours.

    Unlike precision and recall, only real images have balls: one odd image of ours makes no large one. For two sets
    from one distribution, density is 1 and coverage 1 - 2^-k when they are as large.

    Raises:
        DataError: too few real images for k neighbours, or features of two widths.

    Source: Naeem et al. 2020, arXiv:2002.09797, sec. 3.2; balls without their surface, as in their code.
    """
    mine, real, sizes = _sorted_by_group(ours, reference, groups)
    arithmetic = Exact.around(real)
    a, b = arithmetic.points(real), arithmetic.points(mine)
    radii = neighbour_radii(arithmetic, a, k)
    radii = (radii - arithmetic.slack(a, radii))[:, 0]
    held_by = [0] * len(sizes)  # pairs of one of ours and a ball that holds it, by our group
    closest = torch.full((len(real), len(sizes)), math.inf, dtype=torch.float64)  # of ours, by group
    for i, _, group, tile in tiles(arithmetic, a, b, sizes):
        tile -= radii[i, None]
        held_by[group] += int(torch.count_nonzero(tile < 0))
        closest[i, group] = torch.minimum(closest[i, group], tile.amin(dim=1))
    held = closest < 0
    without: dict[str, tuple[float, ...]] = {"density": (), "coverage": ()}
    if groups is not None:
        rest = [[h for h in range(len(sizes)) if h != group] for group in range(len(sizes))]
        without["coverage"] = tuple(held[:, others].any(dim=1).double().mean().item() for others in rest)
        without["density"] = tuple(
            sum(held_by[h] for h in others) / sum(sizes[h] for h in others) / k for others in rest
        )
    return {
        "density": Values(sum(held_by) / len(mine) / k, without["density"]),
        "coverage": Values(held.any(dim=1).double().mean().item(), without["coverage"]),
    }


def few_images(ours: FeatureSet, reference: FeatureSet | None) -> str:
    """What is wrong with neighbour counts of few images; "" when there are as many as in the papers."""
    real = 0 if reference is None else reference.count
    if ours.count >= 10_000 and real >= 10_000:
        return ""
    return (
        f"{ours.count:,} images against {real:,} real ones (papers: 50,000 against 10,000): few images have large "
        "balls; compare at equal counts only"
    )


def few_or_coarse(ours: FeatureSet, reference: FeatureSet | None) -> str:
    """`few_images`, and whether these features are ones that the suite's float16 can tell apart."""
    lines = [few_images(ours, reference)]
    rows = reference.features.get("pool") if reference is not None else None
    if rows is not None and len(rows) > SOME:
        some = rows[:: len(rows) // SOME][:SOME]
        exact = neighbour_radii(how := Exact.around(some), how.points(some), 3)[:, 0]
        half = _in_half_or_single([_suite_points(some)], lambda how, p: neighbour_radii(how, p[0], 3))[:, 0]
        off = float(((half - exact).abs() / exact.clamp_min(torch.finfo(torch.float64).tiny)).median())
        if off > COARSE:
            lines.append(
                f"the suite's float16 changes squared distances between these features by {min(off, 9.99):.0%}, "
                "because they are tiny or lie far from 0 for their spread; trust density and coverage instead"
            )
    return "; ".join(filter(None, lines))


def _sorted_by_group(
    ours: FeatureSet, reference: FeatureSet | None, groups: Tensor | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Our features sorted by group, the real ones, and the sizes of the groups."""
    mine, real = ours.rows("pool"), compared_with(reference).rows("pool")
    refuse_other_width(mine.shape[1], real.shape[1])
    if not len(mine) or not len(real):
        raise DataError(f"{len(mine)} images of ours and {len(real)} real ones: no neighbours to count; give some")
    if groups is None:
        return mine, real, [len(mine)]
    return mine[groups.argsort(stable=True)], real, torch.bincount(groups, minlength=GROUPS).tolist()


def _mean_by_group(values: Tensor, sizes: Sequence[int] | None) -> Values:
    """The mean of a number of each of our images, sorted by group, in full and without each group."""
    values = values.double()
    if sizes is None:
        return Values(values.mean().item())
    total, parts = values.sum(), [part.sum() for part in values.split(list(sizes))]
    left = [((total - part) / (len(values) - size)).item() for part, size in zip(parts, sizes, strict=True)]
    return Values(values.mean().item(), tuple(left))


def _inside(
    arithmetic: Arithmetic, real: Points, real_radii: Tensor, mine: Points, my_radii: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Which of ours lie in a real ball (N,), and which real ones in a ball of ours (M, R), a column for each radius."""
    ours_out = torch.full((len(mine.norms),), math.inf, dtype=mine.norms.dtype)  # how far out of the nearest ball
    real_out = torch.full((len(real.norms), my_radii.shape[1]), math.inf, dtype=real.norms.dtype)
    beyond = torch.empty(0, dtype=mine.norms.dtype)
    for i, j, group, tile in tiles(arithmetic, real, mine, sizes):
        beyond = beyond.resize_(tile.shape)
        # A difference is at most 0 exactly where one number is at most the other, and its minimum is faster than `any`.
        ours_out[j] = torch.minimum(ours_out[j], torch.sub(tile, real_radii[i, None], out=beyond).amin(dim=0))
        for column in range(my_radii.shape[1]):
            if column != 1 + group:
                torch.sub(tile, my_radii[j, column], out=beyond)
                real_out[i, column] = torch.minimum(real_out[i, column], beyond.amin(dim=1))
    return ours_out <= 0, real_out <= 0


class _OverflowError(Exception):
    """A distance is not finite in float16."""


def _in_half_or_single(features: Sequence[tuple[Tensor, Points]], work: Callable[[Arithmetic, list[Points]], _T]) -> _T:
    """The work in float16, or in float32 when a distance of it is not finite in float16.

    The suite decides for each block of 10,000 x 10,000 distances, this for all of them.
    """
    half = Half()
    try:
        if any(not torch.isfinite(points.norms).all() for _, points in features):
            raise _OverflowError
        return work(half, [points for _, points in features])
    except _OverflowError:
        single = Single()
        return work(single, [single.points(rows) for rows, _ in features])


def _suite_points(features: Tensor) -> tuple[Tensor, Points]:
    return features, Half().points(features)


class Single:
    """Float32, nothing centred: what the suite falls back to."""

    def points(self, features: Tensor) -> Points:
        norms = torch.cat([rows.square().sum(dim=1) for rows in features.split(1024)])
        if not bool(torch.isfinite(norms).all()):
            raise DataError(TOO_LARGE)
        return Points(features, norms)

    def products(self, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        return (a.rows[i] @ b.rows[j].T).mul_(-2)

    def squared(self, products: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return products.add_(a[:, None]).add_(b)


class Half:
    """The suite's float16, step by step, in float32 tensors that hold float16 numbers.

    Products are summed in float32 and rounded once, as TensorFlow does it on CPUs and GPUs.
    """

    def points(self, features: Tensor) -> Points:
        # PARITY: half-distances. Features, their squares and every sum of three terms are rounded to float16.
        rounded, norms = torch.empty_like(features), []
        for start in range(0, len(features), 1024):
            half = features[start : start + 1024].half()
            rounded[start : start + 1024] = half
            norms.append(sum_in_half(half * half).float())
        return Points(rounded, torch.cat(norms))

    def products(self, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        found = torch.mm(a.rows[i], b.rows[j].T).mul_(-2)  # by a power of two: rounded or not, nothing is lost
        found.copy_(found.half())
        reach = (a.norms[i].amax().sqrt() + b.norms[j].amax().sqrt()) ** 2  # of any distance and any step towards it
        if reach > 0.9 * _HALF_MAX and not torch.isfinite(found).all():
            raise _OverflowError
        return found

    def squared(self, products: Tensor, a: Tensor, b: Tensor) -> Tensor:
        products.add_(a[:, None])
        products.copy_(products.half())
        products.add_(b)
        products.copy_(products.half())
        if (a.amax().sqrt() + b.amax().sqrt()) ** 2 > 0.9 * _HALF_MAX and not torch.isfinite(products).all():
            raise _OverflowError
        return products


def sum_in_half(values: Float16[Tensor, "N D"]) -> Float16[Tensor, "N"]:
    """Sums of rows in float16, in the order of TensorFlow on x86 CPUs.

    Found by summing numbers that show who met whom first. The same to the bit for every width up to 1,600 and for
    larger multiples of 8; in other widths the last digit may differ.
    """
    # PARITY: half-norms. Eight columns at a time, four running sums of them, and only the last eight in float32.
    width = values.shape[1]
    if width > 1600:
        half = math.ceil(width / 16) * 8
        return sum_in_half(values[:, :half]) + sum_in_half(values[:, half:])
    whole = width // 8 * 8
    packets = values[:, :whole].unflatten(1, (whole // 8, 8))
    fours = packets.shape[1] // 4
    total = torch.zeros(len(values), dtype=torch.float16)
    if packets.shape[1]:
        parts = list(packets[:, 4 * fours :].unbind(1))
        if fours:
            running = packets[:, :4]
            for four in range(1, fours):
                running = running + packets[:, 4 * four : 4 * four + 4]
            parts = [*running.unbind(1), *parts]
        last = parts[0]
        for part in parts[1:]:
            last = last + part
        pairs = last[:, :4].float() + last[:, 4:].float()
        pairs = pairs[:, :2] + pairs[:, 2:]
        total = (pairs[:, 0] + pairs[:, 1]).half()
    rest = torch.zeros_like(total)
    for column in range(whole, width):
        rest = rest + values[:, column]
    return total + rest


PRECISION = Metric(
    label="Precision",
    better="higher",
    needs=("pool",),
    reference="features",
    family=precision_recall,
    definition=f"share of our images in the ball of a real one: {PRECISION_RECALL}",
    bounds=(0, 1),
    caution=few_or_coarse,
)
RECALL = Metric(
    label="Recall",
    better="higher",
    needs=("pool",),
    reference="features",
    family=precision_recall,
    definition=f"share of real images in the ball of one of ours: {PRECISION_RECALL}",
    bounds=(0, 1),
    caution=few_or_coarse,
)
DENSITY = Metric(
    label="Density",
    better="higher",
    needs=("pool",),
    reference="features",
    family=density_coverage,
    definition=f"real images' balls around one of ours, over k: {DENSITY_COVERAGE}",
    bounds=(0, math.inf),
    caution=few_images,
)
COVERAGE = Metric(
    label="Coverage",
    better="higher",
    needs=("pool",),
    reference="features",
    family=density_coverage,
    definition=f"share of real images whose ball holds one of ours: {DENSITY_COVERAGE}",
    bounds=(0, 1),
    caution=few_images,
)
