"""Quality while training: samples of the averaged weights, measured against the training images every so often."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smalti import streams
from smalti.data import ImageSet
from smalti.data.pixels import read_pixels
from smalti.errors import DataError
from smalti.evaluation.features import FeatureNetwork, FeatureSet, extract
from smalti.evaluation.metric import Estimate, check_names, measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.networks import build_network
from smalti.evaluation.rehearsal import rehearse
from smalti.training.config import QualityConfig

_ROWS = 64


@dataclass(frozen=True, eq=False)
class QualityCheck:
    """The metrics of a run, ready to be taken again and again."""

    names: tuple[str, ...]
    network: FeatureNetwork
    reference: FeatureSet

    def sentence(self, step: int, found: Mapping[str, Estimate]) -> str:
        """What `look` found, in one line for a person."""
        numbers = []
        for name, estimate in found.items():
            reach = "" if estimate.high is None else f" ± {estimate.high - estimate.value:.2g}"
            numbers.append(f"{METRICS[name].label_for(self.network.identity.name)} {estimate.value:.4g}{reach}")
        return f"step {step}: {', '.join(numbers)}"

    def look(self, images: Iterable[Tensor]) -> dict[str, Estimate]:
        """The numbers of these images, uint8 (B, 3, H, W) pieces, by metric name."""
        kinds = {kind for name in self.names for kind in METRICS[name].needs}
        ours = extract(images, self.network, kinds=sorted(kinds))
        return measure(ours, self.reference, self.names, METRICS, network=self.network.identity.name)


def prepare_quality(
    config: QualityConfig, images: ImageSet, train_indices: Sequence[int] | np.ndarray, seed: int, device: torch.device
) -> QualityCheck | None:
    """Features of the training images that stand for the reference; made before the first step, so that whatever is
    wrong with them or with the feature network is said before hours of training. None if it is never due.

    Raises:
        SmaltiError: an unknown metric or network, missing weights, too few images for a metric, unreadable images.
    """
    if not config.every:
        return None
    network = build_network(config.features, device=str(device))
    check_names(config.metrics, METRICS, network.identity.name)
    kinds = {kind for name in config.metrics for kind in METRICS[name].needs}
    widths = network.widths
    if missing := kinds - set(widths):
        raise DataError(f"{config.features} makes no {', '.join(sorted(missing))} features; choose other metrics")
    count = min(config.reference_images, len(train_indices))
    rehearse(
        config.metrics,
        METRICS,
        network=network.identity.name,
        widths={kind: widths[kind] for kind in kinds},
        count=config.images,
        reference_count=count,
    )
    chosen = _choose(train_indices, config.reference_images, seed)
    pieces = (read_pixels(images, chosen[start : start + _ROWS]) for start in range(0, len(chosen), _ROWS))
    reference = extract(pieces, network, kinds=sorted(kinds))
    return QualityCheck(tuple(config.metrics), network, reference)


def _choose(indices: Sequence[int] | np.ndarray, count: int, seed: int) -> list[int]:
    """At most `count` of them, a fair share of all, the same for the same seed."""
    order = streams.key(seed, streams.GROUPS)
    places = sorted(streams.permute(i, len(indices), order) for i in range(min(count, len(indices))))
    return [int(indices[place]) for place in places]
