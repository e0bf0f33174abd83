"""The demo's networks measured on features: with intervals, beside images that nobody trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.config import to_dict
from smalti.data import load_image_set, split
from smalti.errors import ConfigError
from smalti.evaluation.networks import build_network
from smalti.report.quality import QualityTable
from smalti.training.config import RunConfig
from smalti.workflows.compare import compare
from smalti.workflows.evaluate import evaluate
from smalti.workflows.evaluate_sources import Drawing
from smalti.workflows.trained_on import part_of

FEATURES = "lite0@96"
METRICS = ("kid", "fd_pca64")  # the two that are honest at some hundred images
HELD_OUT = "held-out set"
MICRO_BATCH = 60


@dataclass(frozen=True)
class DemoQuality:
    """What the page shows, and its numbers for machines.

    Attributes:
        shown: the table, or one sentence that says why there is none.
        numbers: estimates by network (and `HELD_OUT`) and metric; empty without a table.
    """

    shown: QualityTable | str
    numbers: dict[str, Any]


def demo_quality(configs: Mapping[str, RunConfig], out: Path) -> DemoQuality:
    """As many samples of each network as images were held out, and those themselves, against the training images.

    Args:
        configs: of the runs, by the name that the page gives to each network.

    Raises:
        SmaltiError: whatever the user can mend, but for a missing package: then there are no numbers.
    """
    try:
        build_network(FEATURES)
    except ConfigError as error:  # the package with its weights is an extra
        return DemoQuality(f"Not measured: {error}.", {})
    first = next(iter(configs.values()))
    images = load_image_set(first.data.path, first.data.image_size)
    held_out = part_of(first, "validation")
    drawing = Drawing(
        images=len(split(images, first.data.validation_fraction, first.seed).validation),
        micro_batch=MICRO_BATCH,
        precision="bf16" if first.precision == "bf16" else "fp32",
        sampling=first.preview,
    )
    written = evaluate(
        [*(str(config.out) for config in configs.values()), held_out],
        reference=part_of(first, "train"),
        features=FEATURES,
        metrics=METRICS,
        drawing=drawing,
        training="none",
        floor=False,  # the held-out images say it
        device=first.device,
        out=out / "evaluation",
    )
    names = [*configs, HELD_OUT]
    numbers = {
        name: {number.metric: to_dict(number.estimate) for number in result.numbers}
        for name, (_, result) in zip(names, written, strict=True)
    }
    return DemoQuality(compare([path for path, _ in written], names=names).table, numbers)
