"""Quality while training: samples of the averaged weights, measured against the training images every so often."""

import itertools
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
from smalti.world import World

_ROWS = 64


@dataclass(frozen=True, eq=False)
class QualityCheck:
    """The metrics of a run, ready to be taken again and again.

    Args:
        reference: None on all processes but the first.
    """

    names: tuple[str, ...]
    network: FeatureNetwork
    reference: FeatureSet | None
    world: World

    def sentence(self, step: int, found: Mapping[str, Estimate]) -> str:
        """What `look` found, in one line for a person."""
        numbers = []
        for name, estimate in found.items():
            reach = "" if estimate.high is None else f" ± {estimate.high - estimate.value:.2g}"
            numbers.append(f"{METRICS[name].label_for(self.network.identity.name)} {estimate.value:.4g}{reach}")
        return f"step {step}: {', '.join(numbers)}"

    def look(self, images: Iterable[Tensor]) -> dict[str, Estimate] | None:
        """The numbers of all processes' images, by metric name; None on all processes but the first.

        Args:
            images: this process's, uint8 (B, 3, H, W) pieces; maybe none.
        """
        ours = _extract(images, self.network, self.names, self.world)
        if ours is None or self.reference is None:
            return None
        return measure(ours, self.reference, self.names, METRICS, network=self.network.identity.name)


def prepare_quality(
    config: QualityConfig,
    examples: Examples,
    codec: Codec,
    train_indices: Sequence[int] | np.ndarray,
    seed: int,
    device: torch.device,
    world: World,
) -> QualityCheck | None:
    """Features of the images that stand for the reference; made before the first step, so that whatever is
    wrong with them or with the feature network is said before hours of training. None if it is never due. Each process
    looks at its share of the images.

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
        chosen = _choose(range(total), config.reference_images, seed)
    else:
        chosen = _choose(train_indices, config.reference_images, seed)
    share = world.share(len(chosen), _ROWS)
    chosen = chosen[share.start : share.stop]
    if reference_source is not None:
        pieces = reference_source.batches(_ROWS, chosen)
    else:
        blocks = (examples.x0(chosen[start : start + _ROWS]) for start in range(0, len(chosen), _ROWS))
        pieces = (to_uint8(images) for images in decode_batches(codec, blocks))
    return QualityCheck(tuple(config.metrics), network, _extract(pieces, network, config.metrics, world), world)


def _extract(
    images: Iterable[Tensor], network: FeatureNetwork, names: Sequence[str], world: World
) -> FeatureSet | None:
    """What the metrics need, of all processes' images in order of rank; None on all processes but the first."""
    kinds = sorted({kind for name in names for kind in METRICS[name].needs})
    own = iter(images)
    first = next(own, None)
    if first is not None:
        features = extract(itertools.chain([first], own), network, kinds=kinds).features
    elif world.size > 1:
        features = {kind: torch.empty(0, network.widths[kind]) for kind in kinds}
    else:
        features = extract([], network, kinds=kinds).features  # which says what is wrong
    found = world.gather(features)
    return None if found is None else FeatureSet(found)


def _choose(indices: Sequence[int] | np.ndarray, count: int, seed: int) -> list[int]:
    """At most `count` of them, a fair share of all, the same for the same seed."""
    order = streams.key(seed, streams.GROUPS)
    places = sorted(streams.permute(i, len(indices), order) for i in range(min(count, len(indices))))
    return [int(indices[place]) for place in places]
