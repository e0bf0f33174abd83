"""What a perfect generator would get: the same numbers between real images and other real images.

With few images no distance is 0 even where nothing is wrong; a number says something only beside this floor.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from smalti import streams
from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import Metric, check_names, measure

REPEATS = 3


@dataclass(frozen=True)
class Floor:
    """Numbers of real images against the rest of them.

    Attributes:
        values: by metric name; only metrics that compare, and only those for which the reference has features.
        count: real images that stood in for ours; fewer than asked for where the reference has too few.
        against: real images that they were compared with.
    """

    values: Mapping[str, float]
    count: int
    against: int


def clean_floor(
    reference: FeatureSet,
    count: int,
    names: Iterable[str],
    table: Mapping[str, Metric],
    *,
    network: str,
    repeats: int = REPEATS,
) -> Floor:
    """The metrics between `count` random images of the reference and its other images, mean over a few draws.

    Args:
        count: how many images there are of ours; no more than half of the reference is taken.
        table: usually `METRICS`.
        network: name of the feature network behind the reference.
        repeats: draws; the same ones on every machine.

    Raises:
        ConfigError: an unknown metric, one that may not be called so with this network, or no draw at all.
        DataError: a count below 2, or too few real images for one of the metrics.
    """
    names = tuple(dict.fromkeys(names))
    check_names(names, table, network)
    if repeats < 1:
        raise ConfigError(f"a floor needs at least 1 draw, got repeats {repeats}")
    if count < 2:
        raise DataError(f"a floor for {count} images is not a number; give at least 2")
    comparing = [
        name
        for name in names
        if table[name].reference != "nothing" and all(kind in reference.features for kind in table[name].needs)
    ]
    total = reference.count
    taken = min(count, total // 2)
    if not comparing or taken < 2:
        return Floor({}, taken, total - taken)
    by_needs: dict[tuple[str, ...], list[str]] = {}
    for name in comparing:
        by_needs.setdefault(table[name].needs, []).append(name)
    sums = dict.fromkeys(comparing, 0.0)
    for draw in range(repeats):
        order = streams.key(draw, streams.GROUPS, total, taken)  # with ids behind it: not the groups of a jackknife
        places = torch.tensor([streams.permute(i, total, order) for i in range(total)])
        for kinds, asked in by_needs.items():  # subsets are copies: one kind after the other takes less memory
            real = FeatureSet({kind: reference.features[kind] for kind in kinds})
            found = measure(
                real.subset(places[:taken]), real.subset(places[taken:]), asked, table, network=network, intervals=False
            )
            for name in asked:
                sums[name] += found[name].value
    return Floor({name: sums[name] / repeats for name in comparing}, taken, total - taken)
