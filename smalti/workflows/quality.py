"""Quality while training: samples of the averaged weights, measured against the training images every so often."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smalti import streams
from smalti.data import open_images, to_uint8
from smalti.data.examples import Examples
from smalti.errors import DataError
from smalti.evaluation.features import FeatureNetwork, FeatureSet, extract
from smalti.evaluation.metric import Estimate, check_names, measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.networks import build_network
from smalti.evaluation.rehearsal import rehearse
from smalti.latents import Codec, decode_batches
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
    config: QualityConfig,
    examples: Examples,
    codec: Codec,
    train_indices: Sequence[int] | np.ndarray,
    seed: int,
    device: torch.device,
) -> QualityCheck | None:
    """Features of the images that stand for the reference; made before the first step, so that whatever is
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
    reference_source = open_images(config.reference, convert=True) if config.reference else None
    total = len(train_indices) if reference_source is None else reference_source.count
    count = min(config.reference_images, total)
    rehearse(
        config.metrics,
        METRICS,
        network=network.identity.name,
        widths={kind: widths[kind] for kind in kinds},
        count=config.images,
        reference_count=count,
    )
    if reference_source is not None:
        pieces = reference_source.batches(_ROWS, _choose(range(total), config.reference_images, seed))
    else:
        chosen = _choose(train_indices, config.reference_images, seed)
        blocks = (examples.x0(chosen[start : start + _ROWS]) for start in range(0, len(chosen), _ROWS))
        pieces = (to_uint8(images) for images in decode_batches(codec, blocks))
    reference = extract(pieces, network, kinds=sorted(kinds))
    return QualityCheck(tuple(config.metrics), network, reference)


def _choose(indices: Sequence[int] | np.ndarray, count: int, seed: int) -> list[int]:
    """At most `count` of them, a fair share of all, the same for the same seed."""
    order = streams.key(seed, streams.GROUPS)
    places = sorted(streams.permute(i, len(indices), order) for i in range(min(count, len(indices))))
    return [int(indices[place]) for place in places]
