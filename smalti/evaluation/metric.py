"""What a metric is, and how uncertain its number is."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from smalti import streams
from smalti.config import did_you_mean
from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet

GROUPS = 10
# Reach of a 95 % interval in standard errors: Student's t at 97.5 % for GROUPS - 1 degrees of freedom, because the
# standard error is itself estimated from ten numbers.
T_95 = 2.262157


@dataclass(frozen=True)
class Values:
    """One number of a set of images, and the same number without each group of images in turn (maybe none)."""

    value: float
    without: tuple[float, ...] = ()


# (ours, reference, group of each of our images) -> numbers by metric name. Without groups, `without` may stay empty.
Family = Callable[[FeatureSet, FeatureSet | None, Int[Tensor, "N"] | None], Mapping[str, Values]]


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Args:
        label: as papers write it.
        better: which way is better.
        needs: kinds of features of our images.
        reference: what the real images must give: moments, the features of each, or nothing at all.
        family: computes this number, and those that come from the same work.
        definition: constants and rules that change the number, for the protocol.
        network: the only feature network with which the number may have this name; None = any, and the network's
            name is added to the label.
        bounds: the values that are possible.
        caution: one line on what is wrong with the number for these two sets, or "".
        ordered: another order of the same images gives a slightly different number, because it is made from pieces of
            them by position.
    """

    label: str
    better: Literal["lower", "higher"]
    needs: tuple[str, ...]
    reference: Literal["nothing", "moments", "features"]
    family: Family
    definition: str
    network: str | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    caution: Callable[[FeatureSet, FeatureSet | None], str] = lambda ours, reference: ""
    ordered: bool = False

    def label_for(self, network: str) -> str:
        """The name of the number when it is made with this feature network: FID, but KID-lite0."""
        return self.label if self.network or network == "inception" else f"{self.label}-{network}"


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty from the choice of our images; the reference counts as fixed.

    Attributes:
        standard_error, low, high: None where the images were too few to say; low to high is a 95 % interval.
        caution: what to know before quoting it, or "".
        without: the number without each group of images in turn, for differences of numbers; empty where unknown.
    """

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    caution: str = ""
    without: tuple[float, ...] = ()


def compared_with(reference: FeatureSet | None) -> FeatureSet:
    """The reference, which a comparison cannot do without.

    Raises:
        DataError: there is none.
    """
    if reference is None:
        raise DataError("this number compares with real images: give a reference")
    return reference


def refuse_other_width(ours: int, reference: int) -> None:
    """Refuse to compare features of two lengths.

    Raises:
        DataError: they are.
    """
    if ours != reference:
        raise DataError(
            f"our images have {ours} features each and the reference {reference}; use the same feature network for both"
        )


def group_of_each(count: int, groups: int = GROUPS) -> Int[Tensor, "N"]:
    """A random group for each image, of equal sizes give or take one; the same on every machine.

    Random, because folders are often sorted by class, and a class is no fair share of the images.
    """
    order = streams.key(count, streams.GROUPS)
    return torch.tensor([streams.permute(i, count, order) % groups for i in range(count)], dtype=torch.int64)


def jackknife(values: Values, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Estimate:
    """Uncertainty from leaving out each group of images in turn.

    Drawing images anew with replacement, the bootstrap, would put copies among them, and Frechet distances and
    neighbour counts take copies for a narrower distribution; leaving out keeps all images distinct.

    Source: Shao & Tu 1995, "The Jackknife and Bootstrap", sec. 2.3 (grouped jackknife).
    """
    without, n = values.without, len(values.without)
    if n != GROUPS or not all(map(math.isfinite, without)):
        return Estimate(values.value)
    mean = sum(without) / n
    error = math.sqrt((n - 1) / n * sum((v - mean) ** 2 for v in without))
    reach = T_95 * error
    low, high = max(bounds[0], values.value - reach), min(bounds[1], values.value + reach)
    return Estimate(values.value, error, low, high, without=tuple(without))


def measure(
    ours: FeatureSet,
    reference: FeatureSet | None,
    names: Iterable[str],
    table: Mapping[str, Metric],
    *,
    network: str,
    intervals: bool = True,
) -> dict[str, Estimate]:
    """The numbers asked for, each with its uncertainty; what several of them share is computed once.

    Args:
        table: usually `METRICS`.
        network: name of the feature network behind both sets.
        intervals: False leaves the uncertainty out, which takes a fraction of the time.

    Raises:
        ConfigError: an unknown name, or a number that may not be called so with this network.
        DataError: features or statistics that a metric needs are not there.
    """
    names = tuple(dict.fromkeys(names))
    check_names(names, table, network)
    if any(table[name].reference != "nothing" for name in names) and reference is None:
        raise DataError(f"{', '.join(names)} compare with real images: give a reference")
    groups = group_of_each(ours.count) if intervals and ours.count >= 2 * GROUPS else None
    computed: dict[Family, Mapping[str, Values]] = {}
    estimates = {}
    for name in names:
        metric = table[name]
        if metric.family not in computed:
            computed[metric.family] = metric.family(ours, reference, groups)
        found = jackknife(computed[metric.family][name], metric.bounds)
        estimates[name] = dataclasses.replace(found, caution=metric.caution(ours, reference))
    return estimates


def check_names(names: Iterable[str], table: Mapping[str, Metric], network: str) -> None:
    """Refuse metrics that do not exist, or that may not carry their name with this feature network.

    Raises:
        ConfigError: one of them.
    """
    for name in names:
        if name not in table:
            raise ConfigError(f"there is no metric {name!r}{did_you_mean(name, table)}; there are {', '.join(table)}")
        only = table[name].network
        if only is not None and only != network:
            raise ConfigError(
                f"{table[name].label} is defined by the {only} features, and these come from {network}; "
                "ask for fd or kid, or use --features " + only
            )
