"""`evaluate`: from runs, folders or .npz files to numbers that say how they were made. Images are never stored."""

import hashlib
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti import __version__
from smalti.data.sets import cache_folder
from smalti.data.sources import ImageSource
from smalti.errors import ConfigError
from smalti.evaluation.cache import FeatureCache
from smalti.evaluation.features import FeatureNetwork, FeatureSet, extract
from smalti.evaluation.floors import Floor, clean_floor
from smalti.evaluation.memorisation import memorisation
from smalti.evaluation.metric import Estimate, check_names, measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.networks import build_network
from smalti.evaluation.protocol import Protocol, rules_of
from smalti.evaluation.reference import write_statistics
from smalti.evaluation.results import Number, Result, numbers_of, write_result
from smalti.training.device import resolve_device
from smalti.workflows.evaluate_sources import (
    ROWS,
    Drawing,
    MeasuredImages,
    OnStep,
    RealImages,
    kinds_of_ours,
    kinds_of_reference,
    note,
    open_measured,
    open_real,
    open_training,
)
from smalti.workflows.progress import ProgressReport
from smalti.world import World, world

INCEPTION_METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
OTHER_METRICS = ("kid", "fd_pca64", "precision", "recall")


def evaluate(
    sources: Sequence[str],
    *,
    reference: str | None = None,
    features: str = "inception",
    metrics: Sequence[str] = (),
    drawing: Drawing | None = None,
    training: str | None = None,
    intervals: bool = True,
    floor: bool = True,
    image_size: int | None = None,
    convert: bool = False,
    device: str = "auto",
    save_statistics: Path | None = None,
    out: Path | None = None,
) -> list[tuple[Path, Result]]:
    """Numbers of runs or model folders (drawn here, image by image), folders of images, image sets or .npz files.

    Under `torchrun` the processes share the drawing and the feature networks; the first one computes the numbers, which
    do not depend on how many there are.

    Args:
        reference: real images or statistics of them; None = the images that the first run was trained on.
        metrics: empty = those of the papers for inception, kid and fd_pca64 in their place for other networks.
        training: images to look for copies of; None = those that each run was trained on; "none" = do not look.
        intervals, floor: False leaves out the uncertainty, or what real images would get.
        image_size: of existing images; others are scaled and cropped, which changes numbers.
        convert: accept files that are not 8-bit RGB.
        save_statistics: also write mean and covariance of our features there, as a reference for later.
        out: folder for the results; None = `evaluation` in each run, else beside the images.

    Returns:
        One result for each source and the file that holds it; nothing on all processes but the first.

    Raises:
        SmaltiError: whatever the user can mend, as early as it can be known.
    """
    where = resolve_device(device)
    if not sources:
        raise ConfigError("nothing to evaluate: name a run folder, a folder of images or an .npz")
    if save_statistics is not None and len(sources) > 1:
        raise ConfigError("--save-statistics takes one source: statistics of several would overwrite one another")
    options = {"image_size": image_size, "convert": convert}
    all_ours = [open_measured(source, drawing or Drawing(), where, options) for source in sources]
    network = build_network(features, device=str(where))
    called = network.identity.name
    names = tuple(metrics) or (INCEPTION_METRICS if called == "inception" else OTHER_METRICS)
    check_names(names, METRICS, called)
    kinds = kinds_of_ours(names, network)
    real = open_real(reference, next((ours.run for ours in all_ours if ours.run), None), names, network, options)
    copies_of = [open_training(ours.run, training, options) for ours in all_ours]
    written: list[tuple[Path, Result]] = []
    with world() as me:
        looking = _Looking(me, network, FeatureCache(cache_folder() / "features", note if me.rank == 0 else _silent))
        needed = sorted(kinds_of_reference(names) | ({"pool"} if any(copies_of) else set()))
        real_set = looking.real(real, needed) if real is not None else None
        floors: dict[int, Floor] = {}
        for ours, trained in zip(all_ours, copies_of, strict=True):
            started = time.monotonic()
            training_sets = [looking.images(images, ("pool",)) for images in trained]
            found = looking.ours(ours, sorted(kinds | ({"pool"} if trained else set())))
            if found is None:
                continue
            note(f"computing {', '.join(names)}")
            estimates = measure(found, real_set, names, METRICS, network=called, intervals=intervals)
            if floor and real_set is not None and real_set.count and found.count not in floors:
                floors[found.count] = clean_floor(real_set, found.count, names, METRICS, network=called)
            result = Result(
                source=ours.source,
                protocol=Protocol(
                    count=found.count,
                    network=network.identity,
                    reference=real.reference if real is not None else None,
                    metrics=rules_of(names, METRICS),
                    smalti=__version__,
                    **ours.known,
                ),
                numbers=_numbers(estimates, called, floors.get(found.count)),
                memorisation=_copies(found, training_sets),
                machine=_machine(where, me),
                seconds=round(time.monotonic() - started, 1),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            if save_statistics is not None:
                moments = {kind: found.moments(kind) for kind in ("pool", "spatial") if kind in found.features}
                write_statistics(save_statistics, moments, network.identity, ours.source.name, found.count)
                note(f"statistics in {save_statistics}")
            path = _place(result, out, ours.home)
            write_result(result, path)
            note(f"result in {path}")
            written.append((path, result))
    return written


def _place(result: Result, out: Path | None, home: Path) -> Path:
    """Where a result belongs: the same evaluation again takes the same place, another one another."""
    assert result.protocol.network is not None
    name = "-".join(re.findall(r"[\w.]+", result.source.name)) or "images"
    parts = [name, result.protocol.network.name, result.protocol.digest[:12]]
    if out is not None:  # two runs of one name may meet there
        parts.append(hashlib.sha256(str(Path(result.source.path).resolve()).encode()).hexdigest()[:6])
    return (out or home) / f"{'-'.join(parts)}.json"


def _numbers(estimates: Mapping[str, Estimate], network: str, floor: Floor | None) -> tuple[Number, ...]:
    values, count = (floor.values, floor.count) if floor is not None else ({}, 0)
    return numbers_of(estimates, METRICS, network=network, floors=values, floor_count=count)


def _copies(found: FeatureSet, training_sets: Sequence[FeatureSet]) -> dict[str, Any] | None:
    """The report on copies of training images, beside held-out ones where there are some."""
    if not training_sets:
        return None
    report = memorisation(found, training_sets[0], training_sets[1] if len(training_sets) > 1 else None)
    return report.as_dict() | {"sentence": report.verdict}


class _Looking:
    """From images to feature sets, shared with the other processes; whole sets come to the first one."""

    def __init__(self, me: World, network: FeatureNetwork, cache: FeatureCache) -> None:
        self.me, self.network, self.cache = me, network, cache
        # With the kinds asked for, which all processes know; the rows themselves only the first one has.
        self._known: dict[str, tuple[frozenset[str], FeatureSet]] = {}

    def ours(self, images: MeasuredImages, kinds: Sequence[str]) -> FeatureSet | None:
        """Features of the images to be measured; None on all processes but the first."""
        share = self.me.share(images.count, images.unit)
        return self._gathered(images.read, share, kinds, f"drawing and looking at {images.source.name}")

    def real(self, real: RealImages, kinds: Sequence[str]) -> FeatureSet:
        """What is compared with. An ADM reference batch has statistics of all training images and pixels of some of
        them; stated moments stand before those of the features.
        """
        stated = real.statistics.moments if real.statistics is not None else {}
        rows = self.images(real.images, kinds).features if real.images is not None else {}
        return FeatureSet(rows, stated)

    def images(self, source: ImageSource, kinds: Sequence[str]) -> FeatureSet:
        """Features of existing images, from the cache if they are there; empty on all processes but the first."""
        known, before = self._known.get(source.fingerprint, (frozenset(), FeatureSet({})))
        if known and known.issuperset(kinds):
            return before
        found = self.cache.load(source.fingerprint, self.network.identity, kinds) if self.me.rank == 0 else None
        if not self.me.agree(found is not None):
            share = self.me.share(source.count, ROWS)
            found = self._gathered(
                lambda indices, _: source.batches(ROWS, indices=indices), share, kinds, f"looking at {source.name}"
            )
            if found is not None:
                self.cache.keep(source.fingerprint, self.network.identity, kinds, found)
        found = found or FeatureSet({})
        self._known[source.fingerprint] = frozenset(kinds), found
        return found

    def _gathered(
        self, read: Callable[[range, OnStep], Iterator[Tensor]], share: range, kinds: Sequence[str], label: str
    ) -> FeatureSet | None:
        # Fewer images than processes leave some of these with nothing to do, which is no error.
        own = FeatureSet({kind: torch.zeros(0, self.network.widths[kind]) for kind in kinds})
        if share and self.me.rank == 0:
            with ProgressReport(label, len(share), unit="images") as progress:
                done = 0

                def on_batch(count: int) -> None:
                    nonlocal done
                    done = count
                    progress.update(count)

                images = read(share, lambda text: progress.update(done, text))
                own = extract(images, self.network, kinds=kinds, on_batch=on_batch)
        elif share:
            own = extract(read(share, lambda text: None), self.network, kinds=kinds)
        whole = self.me.gather(own.features)
        return None if whole is None else FeatureSet(whole)


def _machine(device: torch.device, me: World) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": me.size,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _silent(text: str) -> None:
    pass
