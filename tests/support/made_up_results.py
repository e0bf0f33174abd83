"""Results with invented numbers, made through the real dataclasses."""

from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.metric import T_95, Estimate
from smalti.evaluation.protocol import MetricRule, Protocol, Reference
from smalti.evaluation.results import FloorValue, Number, Result, Source

LABELS = {"fid": "FID", "inception_score": "IS", "recall": "Recall"}
SAMPLING = {"sampler": "ddpm", "num_inference_steps": 250, "guidance_scale": 1.5}


def number(metric, value, error, floor=None, caution="", without=()):
    """Args: without: the number without each group, as of a set drawn with the same seeds as another."""
    reach = None if error is None else T_95 * error
    estimate = Estimate(value, caution=caution, without=without)
    if reach is not None:
        estimate = Estimate(value, error, value - reach, value + reach, caution, without)
    better = "lower" if metric == "fid" else "higher"
    return Number(metric, LABELS[metric], better, estimate, None if floor is None else FloorValue(floor, 2000))


def made_up(name, numbers, *, sentence=None, **changes):
    """Args: numbers: as `number` makes them; changes: of the protocol."""
    rules = tuple(MetricRule(n.metric, "as ever", n.metric != "inception_score") for n in numbers)
    protocol = {
        "count": 5000,
        "image_size": (32, 32),
        "class_labels": "random",
        "sampling": SAMPLING,
        "ema": True,
        "precision": "fp32",
        "inference": "none",
        "decoder": "pixels",
        "network": NetworkIdentity("inception", "a" * 64, "299, bilinear as TensorFlow 1"),
        "reference": Reference("emoji32", "b" * 64, 1906),
        "metrics": rules,
        "smalti": "0.1.0",
    }
    return Result(
        source=Source(name, f"runs/{name}", {"preset": name}),
        protocol=Protocol(**protocol | changes),
        numbers=tuple(numbers),
        memorisation=None if sentence is None else {"sentence": sentence},
    )
