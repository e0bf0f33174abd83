"""Whether metrics can be computed at all, found with made-up features before hours of drawing images."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import Metric, measure
from smalti.evaluation.moments import Moments

# More images and features than any metric needs at the least: 64 principal axes need 65.
_ENOUGH = 80


def rehearse(
    names: Sequence[str],
    table: Mapping[str, Metric],
    *,
    network: str,
    widths: Mapping[str, int],
    count: int,
    reference_count: int | None,
    stated: Collection[str] = (),
) -> None:
    """Compute the metrics of noise in the place of features, of as many images as there will be, or 80 if fewer.

    Args:
        widths: kinds of features that the network makes, and the length of each.
        reference_count: real images with features; None = there is no reference.
        stated: kinds of which the reference has statistics.

    Raises:
        SmaltiError: what the metrics would say of too few images, or of features or statistics that are not there.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(kind: str, rows: int) -> Tensor:
        return torch.randn(min(rows, _ENOUGH), min(widths[kind], _ENOUGH), generator=generator)

    ours = FeatureSet({kind: noise(kind, count) for kind in widths})
    reference = None
    if reference_count is not None:
        features = {kind: noise(kind, reference_count) for kind in widths} if reference_count else {}
        reference = FeatureSet(features, {kind: Moments.of(noise(kind, _ENOUGH)) for kind in stated})
    measure(ours, reference, names, table, network=network, intervals=False)
