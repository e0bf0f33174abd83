"""Where a network with another mixer becomes cheaper than the same network with attention."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from smalti.cost import count_macs
from smalti.models import BackboneConfig
from smalti.nn.layers import Grid
from smalti.workflows.cost_report import CostRow, Crossover, seconds_of

BASELINE = "attention"
SIDE_STEP = 8  # crossovers are looked for among latents of these sides, which every network can cut into tokens


def tokens_of(config: BackboneConfig) -> int:
    """Of the mixer, at the highest resolution that the network has."""
    grid: Grid = getattr(config, "grid", None) or Grid(*config.sample_size)
    return grid.tokens


def find_crossovers(
    variants: Sequence[tuple[str, str, list[BackboneConfig]]], rows: Sequence[CostRow]
) -> Iterator[Crossover]:
    """Of every mixer beside attention in the same network."""
    attention = {name: configs for name, kind, configs in variants if kind == BASELINE}
    for name, kind, configs in variants:
        if kind == BASELINE or name not in attention:
            continue
        largest = configs[-1]
        for what in ("mixer", "network"):
            yield _counted_crossover(name, kind, what, largest, attention[name][-1])
        ours = [row for row in rows if (row.network, row.mixer) == (name, kind)]
        theirs = [row for row in rows if (row.network, row.mixer) == (name, BASELINE)]
        for what in ("mixer", "network"):
            yield from _measured_crossover(name, kind, what, ours, theirs)


def _counted_crossover(name: str, kind: str, what: str, ours: BackboneConfig, theirs: BackboneConfig) -> Crossover:
    """By bisection over the side of square latents, counted anew at each."""

    def at(side: int) -> BackboneConfig:
        return dataclasses.replace(ours, sample_size=(side, side))

    def cheaper(side: int) -> bool:
        size = (side, side)
        one, other = (
            count_macs(at(side), fused=True),
            count_macs(dataclasses.replace(theirs, sample_size=size), fused=True),
        )
        return one.by_part["mixer"] < other.by_part["mixer"] if what == "mixer" else one.total < other.total

    low, high = 1, max(1, max(ours.sample_size) // SIDE_STEP)  # in steps
    smallest, largest = tokens_of(at(low * SIDE_STEP)), tokens_of(at(high * SIDE_STEP))
    found: int | None
    if cheaper(low * SIDE_STEP):
        found = low
    elif not cheaper(high * SIDE_STEP):
        found = None
    else:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if cheaper(middle * SIDE_STEP) else (middle, high)
        found = high
    tokens = None if found is None else tokens_of(at(found * SIDE_STEP))
    return Crossover(name, kind, what, "multiply-adds", tokens, True, smallest, largest)


def _measured_crossover(
    name: str, kind: str, what: str, ours: Sequence[CostRow], theirs: Sequence[CostRow]
) -> Iterator[Crossover]:
    """Between the last measured size at which attention is faster and the next, on a straight line of logarithms."""
    points = [
        (a.tokens, math.log(mine / other))
        for a, b in zip(ours, theirs, strict=True)
        if (mine := seconds_of(a, what)) is not None and (other := seconds_of(b, what)) is not None
    ]
    if not points:
        return
    smallest, largest = points[0][0], points[-1][0]
    tokens: int | None
    last_slower = max((i for i, (_, ratio) in enumerate(points) if ratio >= 0), default=None)
    if last_slower is None:
        tokens = smallest
    elif last_slower == len(points) - 1:
        tokens = None
    else:
        (left, above), (right, below) = points[last_slower], points[last_slower + 1]
        share = above / (above - below)
        tokens = round(math.exp(math.log(left) + share * math.log(right / left)))
    yield Crossover(name, kind, what, "seconds", tokens, False, smallest, largest)
