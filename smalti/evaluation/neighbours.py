"""Distances between sets of features, tile by tile: neighbours, radii around points, and who lies inside them.

All of it is one matrix product a tile, |u|^2 - 2 u v + |v|^2, and a few passes over the tile while it is in the cache.
How the numbers are rounded on the way is an `Arithmetic`, because published numbers depend on it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.errors import DataError

_TILE = 1280  # rows and columns: 6 MiB in float32, and a matrix product of full speed


TOO_LARGE = "the squares of these features are beyond float32 (3e38): no distances; divide the features by something"


@dataclass(frozen=True, eq=False)
class Points:
    """A set of features as an arithmetic wants them.

    Attributes:
        rows: (N, D).
        norms: (N,), squared lengths, in the precision of the distances.
    """

    rows: Tensor
    norms: Tensor


@runtime_checkable
class Arithmetic(Protocol):
    """How squared distances are computed and rounded."""

    def points(self, features: Tensor) -> Points:
        """Features (N, D), ready for `products`."""

    def products(self, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        """-2 u v for the rows u = a[i] and v = b[j]; the caller owns the result."""

    def squared(self, products: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Squared distances, in the memory of `products`, from the norms `a` of the rows and `b` of the columns.

        May be below 0 by rounding: radii are never below 0, so that comparisons with them come out the same.
        """


@dataclass(frozen=True)
class Exact:
    """Float64 throughout, around a centre so that a common mean costs no digits.

    Squared distances are right to 1e-13 of the squared lengths of both points; `tie` of those counts as no difference.
    """

    centre: Float[Tensor, "D"]
    tie: float = 1e-12

    @staticmethod
    def around(features: Float[Tensor, "N D"]) -> "Exact":
        """Centred where most of the features are."""
        return Exact(middle_of(features))

    def slack(self, points: Points, radii: Tensor) -> Tensor:
        """How far squared distances of points to others at about their squared `radii` (N, R) may be off by rounding.

        Of each ball its own: one point far away must not blur the neighbours of the others.
        """
        return self.tie * (points.norms[:, None] + radii)

    def points(self, features: Tensor) -> Points:
        rows = torch.empty(features.shape, dtype=torch.float64)
        for away, given in zip(rows.split(_TILE), features.split(_TILE), strict=True):
            away.copy_(given).sub_(self.centre)
        return Points(rows, torch.cat([away.square().sum(dim=1) for away in rows.split(_TILE)]))

    def products(self, a: Points, i: slice, b: Points, j: slice) -> Tensor:
        return (a.rows[i] @ b.rows[j].T).mul_(-2)

    def squared(self, products: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return products.add_(a[:, None]).add_(b)


def middle_of(features: Tensor) -> Float[Tensor, "D"]:
    """Median of each feature, of a few hundred rows: where most of them are, whatever a few others do; float64."""
    return features[:: max(1, len(features) // 256)].double().median(dim=0).values


def pieces(sizes: Sequence[int], largest: int | None = None) -> list[tuple[slice, int]]:
    """Rows of each tile, at most `largest`, and the group that they are of, for rows sorted by group."""
    found, start = [], 0
    for group, size in enumerate(sizes):
        parts = math.ceil(size / (largest or _TILE))
        cuts = [start + size * part // parts for part in range(parts + 1)] if parts else []
        found += [(slice(a, b), group) for a, b in pairwise(cuts)]
        start += size
    return found


def tiles(
    arithmetic: Arithmetic, a: Points, b: Points, sizes: Sequence[int]
) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """Squared distances of all rows of `a` to all of `b`: rows, columns, group of the columns, tile."""
    for j, group in pieces(sizes):
        for i, _ in pieces([len(a.norms)]):
            yield i, j, group, arithmetic.squared(arithmetic.products(a, i, b, j), a.norms[i], b.norms[j])


def neighbour_radii(
    arithmetic: Arithmetic, points: Points, k: int, sizes: Sequence[int] | None = None
) -> Float[Tensor, "N R"]:
    """Squared distance of every point to its k-th nearest other point; in one pass also without each group.

    Each product serves both its rows and its columns: the matrix is computed above its diagonal only.

    Args:
        sizes: of groups that follow one another; None = no groups.

    Returns:
        Column 0 in full. Column 1 + g among the points outside group g; -inf for those in it: they have no ball then.

    Raises:
        DataError: too few points to have k others.
    """
    count = len(points.norms)
    groups = [count] if sizes is None else list(sizes)
    if count - (max(groups) if sizes is not None else 0) <= k:
        raise DataError(f"{count} images are too few: each needs {k} others near it; give more")
    # The k + 1 smallest of each group, a point itself among them: whichever group is left out, the others know.
    nearest = torch.full((count, len(groups), k + 1), math.inf, dtype=points.norms.dtype)
    cuts = pieces(groups)
    for place, (i, group) in enumerate(cuts):
        for j, other in cuts[place:]:
            products = arithmetic.products(points, i, points, j)
            if i != j:
                turned = arithmetic.squared(products.T.contiguous(), points.norms[j], points.norms[i])
                _keep_smallest(nearest[j, group], turned)
            _keep_smallest(nearest[i, other], arithmetic.squared(products, points.norms[i], points.norms[j]))
    found = [_last_of_smallest(nearest)]
    if sizes is not None:
        own = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
        for group in range(len(groups)):
            others = [other for other in range(len(groups)) if other != group]
            found.append(_last_of_smallest(nearest[:, others]).masked_fill(own == group, -math.inf))
    return torch.stack(found, dim=1)


def _keep_smallest(best: Tensor, tile: Tensor) -> None:
    """Update the smallest values (rows, k + 1) with those of a tile (rows, columns)."""
    found = tile.topk(min(best.shape[1], tile.shape[1]), largest=False, sorted=False).values
    best.copy_(torch.cat([best, found], dim=1).topk(best.shape[1], largest=False, sorted=False).values)


def _last_of_smallest(nearest: Tensor) -> Tensor:
    """The largest of the k + 1 smallest values over all groups; not below 0, where rounding may put it."""
    values = nearest.flatten(1).topk(nearest.shape[2], largest=False, sorted=False).values
    return values.amax(dim=1).clamp_min(0)


def nearest(queries: Tensor, base: Tensor, *, same: bool = False) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
    """Euclidean distance of each query to its nearest point of `base`, and which that is.

    Found in float32 among centred values; the four best of each query are then measured again in float64.

    Args:
        queries, base: (N, D) and (M, D), of any number type; converted piece by piece.
        same: both are one set, and no point counts as its own neighbour.

    Raises:
        DataError: widths differ, or there is nobody to be near to.
    """
    if queries.ndim != 2 or base.ndim != 2 or queries.shape[1] != base.shape[1]:
        raise DataError(f"cannot compare {tuple(queries.shape)} with {tuple(base.shape)}: rows must be of one width")
    if len(base) <= same or not len(queries):
        raise DataError(f"{len(queries)} and {len(base)} images: none has a neighbour; give more")
    largest = min(_TILE, max(64, (1 << 24) // max(1, base.shape[1])))  # 64 MiB of wide rows in float32
    room = torch.empty(min(largest, len(base)), base.shape[1])  # fresh memory takes longer than converting into it
    middle = middle_of(base).float()

    def centred(rows: Tensor) -> Tensor:
        return room[: len(rows)].copy_(rows).sub_(middle)

    norms = torch.cat([centred(rows).square_().sum(dim=1) for rows in base.split(largest)])
    if not bool(torch.isfinite(norms).all()):
        raise DataError(TOO_LARGE)
    candidates = min(4, len(base) - same)
    distances, indices = [], []
    # More queries than neighbours at a time: each piece of `base` is converted once for all of them.
    for i, _ in pieces([len(queries)], 4 * largest):
        u = queries[i].float() - middle
        best = torch.full((len(u), candidates), math.inf)
        where = torch.zeros(len(u), candidates, dtype=torch.int64)
        for j, _ in pieces([len(base)], largest):
            tile = torch.addmm(norms[j], u, centred(base[j]).T, alpha=-2)  # |u|^2 is the same for all
            first, stop = max(i.start, j.start), min(i.stop, j.stop)
            if same and first < stop:
                tile[first - i.start : stop - i.start, first - j.start : stop - j.start].fill_diagonal_(math.inf)
            found = tile.topk(min(candidates, tile.shape[1]), largest=False, sorted=False)
            values, places = torch.cat([best, found.values], 1), torch.cat([where, found.indices + j.start], 1)
            best, chosen = values.topk(candidates, largest=False, sorted=False)
            where = places.gather(1, chosen)
        exact = torch.full(best.shape, math.inf, dtype=torch.float64)
        for c in range(candidates):
            for row in torch.arange(len(u)).split(max(1, (1 << 22) // max(1, base.shape[1]))):
                gap = queries[i][row].double() - base[where[row, c]].double()
                exact[row, c] = gap.square().sum(dim=1)
        exact.masked_fill_(best.isinf(), math.inf)  # a place that no other point took
        value, chosen = exact.min(dim=1)
        distances.append(value.sqrt())
        indices.append(where.gather(1, chosen[:, None])[:, 0])
    return torch.cat(distances), torch.cat(indices)
