"""The path of `smalti evaluate` from a stream of images to numbers with intervals: time and peak memory of each phase.

The feature network is a stand-in that costs next to nothing and makes as many features as Inception does, because what
is asked here is what happens to the features. Each phase has the peak of resident memory since it began.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from smalti.errors import SmaltiError
from smalti.evaluation.features import FeatureSet, NetworkIdentity, extract
from smalti.evaluation.floors import clean_floor
from smalti.evaluation.metric import Estimate, measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.networks.inception import WIDTHS
from smalti.evaluation.results import numbers_of

# Limits on the highest resident memory of the process.
STREAMS = {
    "stream": (("fid", "sfid", "inception_score"), 3 << 30),
    "stream-neighbours": (("fid", "sfid", "inception_score", "precision", "recall"), 4 << 30),
    "stream-infinity": (("fid_infinity",), 3 << 30),
}
_SIDE = 8  # pixels of an image
_BATCH = 64  # images at once, as evaluation reads them
_T = TypeVar("_T")


class StandIn:
    """Features of Inception's kinds and widths: pixels, projected at random, negative ones cut off."""

    identity = NetworkIdentity("inception", "none: a stand-in", "none")
    widths = WIDTHS

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        total = sum(WIDTHS.values())
        self._weights = torch.randn(3 * _SIDE**2, total, generator=generator) / (3 * _SIDE**2) ** 0.5

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        values = ((images.flatten(1).float() - 128) / 64) @ self._weights
        parts = values.split(list(WIDTHS.values()), dim=1)
        return {kind: part.relu() for kind, part in zip(WIDTHS, parts, strict=True)}


def measure_stream(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: what the process of this work does, phase by phase."""
    names, limit = STREAMS[name]
    clock = time.process_time if options.threads == 1 else time.perf_counter
    network, phases = StandIn(), dict[str, dict[str, float]]()
    needs = sorted({kind for metric in names for kind in METRICS[metric].needs})
    compared = sorted({k for m in names if METRICS[m].reference != "nothing" for k in METRICS[m].needs})

    def phase(what: str, run: Callable[[], _T]) -> _T:
        _forget_peak()
        started = clock()
        result = run()
        phases[what] = {"seconds": clock() - started, "peak_bytes": peak_bytes()}
        return result

    def look(count: int, seed: int, kinds: list[str]) -> FeatureSet:
        return extract(images(count, seed), network, kinds=kinds)

    real = phase("features of real images", lambda: look(options.reference_count, 1, compared))
    ours = phase("features of our images", lambda: look(options.count, 2, needs))
    estimates: dict[str, Estimate] = {}
    for metrics in _by_family(names):
        estimates |= phase(
            " and ".join(metrics), lambda m=metrics: measure(ours, real, m, METRICS, network=network.identity.name)
        )
    floor = phase("floor", lambda: clean_floor(real, options.count, names, METRICS, network=network.identity.name))
    numbers = numbers_of(
        estimates, METRICS, network=network.identity.name, floors=floor.values, floor_count=floor.count
    )
    return {
        "work": name,
        "count": options.count,
        "reference_count": options.reference_count,
        "width": {kind: WIDTHS[kind] for kind in needs},
        "seconds": sum(p["seconds"] for p in phases.values()),
        "peak_bytes": max(p["peak_bytes"] for p in phases.values()),
        "limit_bytes": limit,
        "phases": phases,
        "feature_bytes": sum(rows.nelement() * 4 for s in (ours, real) for rows in s.features.values()),
        "clock": "cpu time" if options.threads == 1 else "wall time",
        "values": {n.metric: n.estimate.value for n in numbers},
        "standard_errors": {n.metric: n.estimate.standard_error for n in numbers},
    }


def images(count: int, seed: int) -> Iterator[Tensor]:
    """uint8 (B, 3, 8, 8) of noise around a grey of their own."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, _BATCH):
        n = min(_BATCH, count - start)
        grey = torch.randint(64, 192, (n, 3, 1, 1), generator=generator)
        noise = torch.randint(-64, 64, (n, 3, _SIDE, _SIDE), generator=generator)
        yield (grey + noise).to(torch.uint8)


def _by_family(names: tuple[str, ...]) -> list[list[str]]:
    """Numbers that come from the same work stay together."""
    families: dict[Any, list[str]] = {}
    for name in names:
        families.setdefault(METRICS[name].family, []).append(name)
    return list(families.values())


def peak_bytes() -> int:
    """The most memory that this process held, since it began or since `_forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SmaltiError("peak memory of a process is read from Linux's /proc/self/status; it is not here")


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise SmaltiError(f"the peak of a phase needs Linux's /proc/self/clear_refs: {error}") from error
