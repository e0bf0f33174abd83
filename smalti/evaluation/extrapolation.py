"""Frechet distance for endlessly many images of ours: a line through distances over 1 / count, read at 0.

A Frechet distance is too large by about c / N, and c differs between models, so that rankings at one N can be wrong.
Chong & Forsyth fit a line to distances of random subsets. Here the subsets are all images, and halves that complete
each other: in the mean of two complementary halves the luck of the draw cancels to first order, and only the bias that
is sought remains. On Gaussians of known distance (2,000 images with 32 and 256 features; 5,000 with 64) the root mean
square error with three such halvings is 0.8, 0.6 and 0.6 of that with eight nested subsets from N / 4 to N. The bias
from the number of reference images stays: it is the same for all models.

Source: Chong & Forsyth 2020, arXiv:1911.07023.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smalti.errors import DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.frechet import FORMULA, count_and_width, distances_of_unions
from smalti.evaluation.metric import GROUPS, Metric, Values, compared_with, group_of_each

# Each names the groups of one half; the other half is the rest.
HALVINGS = tuple(frozenset((start + i) % GROUPS for i in range(GROUPS // 2)) for start in (0, 2, 4))

# With fewer images for each feature the line bends, and takes off more than the bias: 3 % of it at 8, 6 % at 4, 12 % at
# 2.4, 24 % at 1, on Gaussians of 128 features.
STRAIGHT = 4


def at_infinity(whole: float, halvings: Sequence[Sequence[tuple[int, float]]]) -> float:
    """Where the line over 1 / count through all images and through their halves meets 0.

    Args:
        whole: distance of all N images.
        halvings: of each the (count, distance) of both halves. Weighted by its count, a mean of two halves stands at
            2 / N whatever their sizes, and each image weighs the same in it, so that its luck cancels.
    """
    means = [sum(n * distance for n, distance in halves) / sum(n for n, _ in halves) for halves in halvings]
    return 2 * whole - sum(means) / len(means)


def _family(ours: FeatureSet, reference: FeatureSet | None, groups: Tensor | None) -> Mapping[str, Values]:
    real = compared_with(reference).moments("pool")
    count = len(ours.rows("pool"))
    if count < 2 * GROUPS:
        raise DataError(f"extrapolation splits the images into {GROUPS} groups of 2 at least, and these are {count}")
    leave_out = groups is not None
    groups = group_of_each(count) if groups is None else groups
    sizes = torch.bincount(groups, minlength=GROUPS).tolist()
    everything = frozenset(range(GROUPS))
    selections = [everything, *(everything - {out} for out in range(GROUPS) if leave_out)]
    designs = [(whole, [(whole & chosen, whole - chosen) for chosen in HALVINGS]) for whole in selections]
    # Halves that a left-out group was not in recur.
    unions = list(dict.fromkeys(u for whole, halvings in designs for u in (whole, *itertools.chain(*halvings))))
    found = dict(zip(unions, distances_of_unions(ours, "pool", groups, unions, real), strict=True))
    value, *without = (
        at_infinity(
            found[whole], [[(sum(sizes[g] for g in half), found[half]) for half in halves] for halves in halvings]
        )
        for whole, halvings in designs
    )
    values = Values(value, tuple(without))
    return {"fid_infinity": values, "fd_infinity": values}


def _caution(ours: FeatureSet, reference: FeatureSet | None) -> str:
    count, width = count_and_width(ours, "pool")
    if count is not None and count < STRAIGHT * width:
        return (
            f"{count:,} images are fewer than {STRAIGHT} times the {width:,} features: distances are not yet a line "
            "over 1 / count, which makes the number too small; take more images, or kid or fd_pca64"
        )
    return ""


def _row(label: str, network: str | None) -> Metric:
    halvings = ", ".join(str(sorted(half)) for half in HALVINGS)
    return Metric(
        label=label,
        better="lower",
        needs=("pool",),
        reference="moments",
        family=_family,
        definition=(
            f"line through Frechet distances over 1 / count, at 0: all images, and the mean of halvings of {GROUPS} "
            f"random groups into {halvings} and the rest; {FORMULA}"
        ),
        network=network,
        caution=_caution,
        ordered=True,
    )


FID_INFINITY = _row("FID-infinity", "inception")
FD_INFINITY = _row("FD-infinity", None)
