"""Mean and covariance in float64, gathered in pieces and merged in any grouping."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.errors import DataError

_ROWS = 4096  # converted to float64 at once: 64 MiB at 2048 dimensions
_PANEL = 512  # columns of the covariance computed at once


@dataclass(frozen=True, eq=False)
class Moments:
    """What a Gaussian fitted to features needs.

    Attributes:
        count: images behind it; None for statistics whose file does not say.
        mean, covariance: float64; the covariance divides by count - 1, as `numpy.cov` does.
    """

    count: int | None
    mean: Float[Tensor, "D"]
    covariance: Float[Tensor, "D D"]

    @staticmethod
    def of(features: Float[Tensor, "N D"]) -> "Moments":
        """Moments of all rows; two passes, so that a large mean costs no digits.

        Raises:
            DataError: fewer than two rows: they have no covariance.
        """
        if len(features) < 2:
            raise DataError(f"{len(features)} images have no covariance; give at least 2")
        total = torch.zeros(features.shape[1], dtype=torch.float64)
        room = torch.empty(
            min(_ROWS, len(features)), len(total), dtype=torch.float64
        )  # fresh memory takes as long again
        for rows in features.split(_ROWS):
            total += room[: len(rows)].copy_(rows).sum(dim=0)
        mean = total / len(features)
        scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for rows in features.split(_ROWS):
            away = room[: len(rows)].copy_(rows).sub_(mean)
            # The matrix is symmetric: panels from the diagonal on, 5/8 of the products at 2048 dimensions.
            for start in range(0, len(mean), _PANEL):
                panel = slice(start, start + _PANEL)
                scatter[panel, start:].addmm_(away[:, panel].T, away[:, start:])
        scatter = scatter.triu() + scatter.triu(1).T
        return Moments(len(features), mean, scatter.div_(len(features) - 1))

    @staticmethod
    def merged(parts: Iterable["Moments"]) -> "Moments":
        """Moments of all images together, from those of disjoint parts.

        Raises:
            DataError: no part at all, or one that does not say how many images it has.

        Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
        """
        parts = tuple(parts)
        if not parts or any(part.count is None for part in parts):
            raise DataError("only statistics that say their number of images can be merged; make them anew")
        counts = [part.count or 0 for part in parts]
        count = sum(counts)
        mean = torch.zeros_like(parts[0].mean)
        for part, n in zip(parts, counts, strict=True):
            mean += part.mean * (n / count)
        scatter = torch.zeros_like(parts[0].covariance)
        for part, n in zip(parts, counts, strict=True):
            away = part.mean - mean
            scatter += part.covariance * (n - 1) + n * torch.outer(away, away)
        return Moments(count, mean, scatter / (count - 1))

    def without(self, part: "Moments") -> "Moments":
        """Moments of the images that are here and not in `part`, which must be among them.

        Raises:
            DataError: a count is missing, or fewer than two images would be left.
        """
        if self.count is None or part.count is None or self.count - part.count < 2:
            raise DataError("what is left must be at least 2 images of statistics that say their number of images")
        count = self.count - part.count
        mean = (self.mean * self.count - part.mean * part.count) / count
        away, gap = part.mean - self.mean, mean - self.mean
        scatter = self.covariance * (self.count - 1) - part.covariance * (part.count - 1)
        scatter -= part.count * torch.outer(away, away) + count * torch.outer(gap, gap)
        return Moments(count, mean, scatter / (count - 1))
