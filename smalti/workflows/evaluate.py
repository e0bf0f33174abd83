"""`evaluate`: from runs, folders or .npz files to numbers that say how they were made. Images are never stored."""

import hashlib
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti import __version__
from smalti.config import did_you_mean
from smalti.data.sets import cache_folder
from smalti.data.sources import ImageSource
from smalti.errors import ConfigError, DataError
from smalti.evaluation.cache import FeatureCache
from smalti.evaluation.features import FeatureNetwork, FeatureSet, extract
from smalti.evaluation.floors import Floor, clean_floor
from smalti.evaluation.memorisation import memorisation
from smalti.evaluation.metric import Estimate, check_names, measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.networks import build_network
from smalti.evaluation.protocol import Protocol, rules_of
from smalti.evaluation.reference import write_statistics
from smalti.evaluation.rehearsal import rehearse
from smalti.evaluation.results import Number, Result, numbers_of, write_result
from smalti.training.device import resolve_device
from smalti.workflows.evaluate_sources import (
    ROWS,
    Drawing,
    MeasuredImages,
    OnStep,
    RealImages,
    check_there,
    is_model,
    kinds_of_ours,
    kinds_of_reference,
    note,
    open_measured,
    open_real,
    open_training,
)
from smalti.workflows.out_folder import check_folder
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
        metrics: empty = those of the papers for inception, kid and fd_pca64 in their place for other networks; none at
            all where only statistics of images are to be saved.
        training: images to look for copies of; None = those that each run was trained on; "none" = do not look.
        intervals, floor: False leaves out the uncertainty, or what real images would get.
        image_size: of existing images; others are scaled and cropped, which changes numbers.
        convert: accept files that are not 8-bit RGB.
        save_statistics: also write mean and covariance of our features there, as a reference for later. Of images that
            exist, without a reference and metrics, that is all that is done.
        out: folder for the results; None = `evaluation` in each run, else beside the images.

    Returns:
        One result for each source and the file that holds it; nothing on all processes but the first.

    Raises:
        SmaltiError: whatever the user can mend, as early as it can be known.
    """
    where = World.launched().device(resolve_device(device))
    _check_request(sources, reference, metrics, drawing, training, save_statistics, out)
    options = {"image_size": image_size, "convert": convert}
    network = build_network(features, device=str(where))
    called = network.identity.name
    names = tuple(dict.fromkeys(metrics)) or (INCEPTION_METRICS if called == "inception" else OTHER_METRICS)
    if save_statistics is not None and not metrics and reference is None and not is_model(Path(sources[0])):
        names = ()  # there is nothing to compare with
    check_names(names, METRICS, called)
    kinds = kinds_of_ours(names, network)
    if save_statistics is not None:
        kinds |= {"pool", "spatial"} & set(network.widths)
    all_ours = [open_measured(source, drawing or Drawing(), where, options) for source in sources]
    for ours in all_ours:
        check_folder(out or ours.home, "--out")
    real = open_real(reference, next((ours.run for ours in all_ours if ours.run), None), names, network, options)
    copies_of = [open_training(ours.run, training, options) for ours in all_ours]
    _check_sizes(all_ours, real, names, kinds, network)
    written: list[tuple[Path, Result]] = []
    with world() as me:
        looking = _Looking(me, network, FeatureCache(cache_folder() / "features", note))
        needed = sorted(kinds_of_reference(names) | ({"pool"} if any(copies_of) else set()))
        real_set = looking.real(real, needed) if real is not None else None
        floors: dict[int, Floor | None] = {}
        for ours, trained in zip(all_ours, copies_of, strict=True):
            started = time.monotonic()
            training_sets = [looking.images(images, ("pool",)) for images in trained]
            found = looking.ours(ours, sorted(kinds | ({"pool"} if trained else set())))
            if found is None:
                continue
            if save_statistics is not None:
                _save_statistics(save_statistics, found, network, ours)
            if not names:
                continue
            note(f"computing {', '.join(names)}")
            estimates = measure(found, real_set, names, METRICS, network=called, intervals=intervals)
            if floor and real_set is not None and found.count not in floors:
                floors[found.count] = _floor(found.count, real_set, names, network)
            protocol = Protocol(
                count=found.count,
                network=network.identity,
                reference=real.reference if real is not None else None,
                metrics=rules_of(names, METRICS),
                smalti=__version__,
                **ours.known,
            )
            result = Result(
                source=ours.source,
                protocol=protocol,
                numbers=_numbers(estimates, called, floors.get(found.count)),
                memorisation=_copies(found, training_sets),
                machine=_machine(where, me),
                seconds=round(time.monotonic() - started, 1),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            path = _place(result, out, ours.home)
            write_result(result, path)
            note(f"result in {path}")
            written.append((path, result))
    return written


def _check_request(
    sources: Sequence[str],
    reference: str | None,
    metrics: Sequence[str],
    drawing: Drawing | None,
    training: str | None,
    save_statistics: Path | None,
    out: Path | None,
) -> None:
    """What can be known to be wrong before anything is read or downloaded."""
    if not sources:
        raise ConfigError("nothing to evaluate: name a run folder, a folder of images or an .npz")
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise ConfigError(f"{twice[0]} is named twice; name each source once")
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"there is no metric {name!r}{did_you_mean(name, METRICS)}")
    for source in sources:
        check_there(source)
    if reference is not None:
        check_there(reference, "--reference")
    if training not in (None, "none"):
        check_there(str(training), "--training")
    if drawing is not None and drawing.changed and not any(is_model(Path(source)) for source in sources):
        raise ConfigError(
            f"{', '.join(drawing.changed)} would change nothing: {', '.join(sources)} {'are' if sources[1:] else 'is'} "
            "measured whole and as stored, only runs are drawn from; leave it out"
        )
    if out is not None:
        check_folder(out, "--out")
    if save_statistics is not None:
        if len(sources) > 1:
            raise ConfigError("--save-statistics takes one source: statistics of several would overwrite one another")
        if save_statistics.suffix != ".npz" or save_statistics.is_dir():
            raise ConfigError(f"--save-statistics {save_statistics}: give the name of a file that ends in .npz")
        check_folder(save_statistics.parent, "--save-statistics")


def _check_sizes(
    all_ours: Sequence[MeasuredImages],
    real: RealImages | None,
    names: Sequence[str],
    kinds: Collection[str],
    network: FeatureNetwork,
) -> None:
    """Too few images for a metric, too many for the memory, and pixels of another size than those compared with."""
    images = real.images if real is not None else None
    stated = real.statistics.moments if real is not None and real.statistics is not None else {}
    widths = {kind: network.widths[kind] for kind in kinds}
    for ours in all_ours:
        needed = 4 * sum(widths.values()) * (ours.count + (images.count if images is not None else 0))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            raise ConfigError(
                f"the features of {ours.count:,} images and of those they are compared with take "
                f"{needed / 2**30:.0f} GiB, and this machine has {memory / 2**30:.0f}; measure fewer (--images)"
            )
        try:
            rehearse(
                names,
                METRICS,
                network=network.identity.name,
                widths=widths,
                count=ours.count,
                reference_count=None if real is None else images.count if images is not None else 0,
                stated=stated.keys() & widths.keys(),
            )
        except DataError as error:
            raise DataError(f"{ours.source.name} cannot be measured so: {error}") from error
        size = ours.known["image_size"]
        if images is not None and images.image_size != size:
            note(
                f"{ours.source.name} has images of {size[0]} x {size[1]} pixels and {images.name} of "
                f"{images.image_size[0]} x {images.image_size[1]}: the numbers count that difference, too"
            )


def _save_statistics(path: Path, found: FeatureSet, network: FeatureNetwork, ours: MeasuredImages) -> None:
    moments = {kind: found.moments(kind) for kind in ("pool", "spatial") if kind in found.features}
    write_statistics(path, moments, network.identity, ours.source.name, found.count)
    note(f"statistics in {path}")


def _floor(count: int, real_set: FeatureSet, names: Sequence[str], network: FeatureNetwork) -> Floor | None:
    """What real images would get in place of as many of ours; None, and said, where they are not enough for both."""
    if not real_set.count:
        return None
    taken = min(count, real_set.count // 2)
    comparing = [name for name in names if METRICS[name].reference != "nothing"]
    widths = {kind: network.widths[kind] for kind in kinds_of_reference(names)}
    called = network.identity.name
    left = real_set.count - taken
    try:
        rehearse(comparing, METRICS, network=called, widths=widths, count=taken, reference_count=left)
    except DataError as error:
        note(f"what real images would get is left out, {real_set.count:,} are too few for two sets: {error}")
        return None
    return clean_floor(real_set, count, names, METRICS, network=called)


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
        what = "looking at" if images.run is None else "drawing and looking at"
        return self._gathered(images.read, share, kinds, f"{what} {images.source.name}")

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
