"""A look at all that a run would be trained on: images of a folder, tar shards, latents, or a set by name.

What was found is stored, so that whatever reads the data next starts without looking again.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smalti.data.folder_index import read_known, write_known
from smalti.data.folder_pass import FolderIndex, RejectedFile, index_folder
from smalti.data.grouping import equal_rows
from smalti.data.image_set import ImageSet
from smalti.data.latent_set import LatentSet, is_latents, open_latents
from smalti.data.sets import BUILT_IN, load_image_set
from smalti.data.shard_index import ShardIndex
from smalti.data.shard_place import find_shards, is_shards, names_all
from smalti.data.shards import classes, image_sizes, index_shards, unusable

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CheckReport:
    """What a look found.

    Attributes:
        text: for people, several lines.
        usable: whether anything can be trained on, if need be without the files that are named.
    """

    text: str
    usable: bool


def check(
    spec: str,
    *,
    listed: int | None = 50,
    beside: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Look at all of a set, store an index of folders and shards, and say what is there.

    Args:
        listed: how many rejected files to name; `None` = all.
        beside: store the index beside the data, for everybody who reads it.
        processes: that look at shards at the same time; None = one for each core, at most 8.
        progress: called with (files, shards or chunks done, found).

    Raises:
        DataError: nothing is there, a shard is damaged, or the layout is such that classes cannot be told.
        StorageError: a store cannot be reached, or the index cannot be kept.
    """
    folder = Path(spec)
    if spec in BUILT_IN or (folder / "items.json").is_file():
        return CheckReport(_describe_set(load_image_set(spec)), True)
    if is_latents(spec):
        latents = open_latents(spec)
        damaged = latents.check(progress)
        return CheckReport("\n".join([*_latent_lines(latents), *damaged]), not damaged)
    if is_shards(spec):
        store, names = find_shards(spec)
        shards = index_shards(
            store, names, whole=names_all(spec), beside=beside, processes=processes, progress=progress
        )
        return CheckReport(_describe_shards(store.place, shards, listed), any(map(len, shards)))
    index = index_folder(folder, known=read_known(folder), progress=progress)
    text = describe_index(index, listed=listed)
    if index.known:
        text += f"\nindex: {write_known(folder, index, beside=beside)}"
    elif index.entries:
        text += "\nindex: not stored, because the files were written a moment ago; check again later"
    return CheckReport(text, bool(index.entries))


def _describe_set(images: ImageSet) -> str:
    rows, columns = images.image_size
    lines = [f"{images.name}: {len(images)} images, {rows} x {columns}, fingerprint {images.fingerprint[:16]}"]
    return "\n".join(lines + _class_lines(images.class_names, images.class_labels))


def describe_index(index: FolderIndex, *, listed: int | None = 50) -> str:
    """The report on a folder."""
    entries = index.entries
    lines = [f"{index.root}: {len(entries)} images, {len(index.unusable)} unusable files"]
    if entries:
        sizes = sorted({e.image_size for e in entries})
        kinds = Counter(f"{e.format} {e.mode}" for e in entries)
        lines += _common_lines(sizes, kinds, len(entries) - len({e.sha256 for e in entries}))
    lines += _class_lines(index.class_names, index.class_labels)
    notes = [(e.path, note) for e in entries for note in e.notes]
    return "\n".join(lines + _findings(index.rejected, notes, listed))


def _describe_shards(where: str, shards: Sequence[ShardIndex], listed: int | None) -> str:
    bad = unusable(shards)
    lines = [f"{where}: {sum(map(len, shards))} images in {len(shards)} tar shards, {len(bad)} unusable files"]
    if any(map(len, shards)):
        kinds = Counter[str]()
        for shard in shards:
            kinds.update(dict(shard.kinds))
        copies = len(equal_rows([shard.digest for shard in shards])[0])
        lines += _common_lines(image_sizes(shards), kinds, copies)
        lines += _class_lines(*classes(where, shards))
    rejected = [RejectedFile(f"{s.shard}:{r.path}", r.reason, r.other) for s in shards for r in s.rejected]
    notes = [(f"{s.shard}:{path}", note) for s in shards for path, note in s.notes]
    return "\n".join(lines + _findings(rejected, notes, listed))


def _latent_lines(latents: LatentSet) -> list[str]:
    identity = latents.record.identity
    rows, columns = identity.image_size
    channels, *size = identity.latent_shape
    return [
        f"{latents.name}: latents of {len(latents)} images of {rows} x {columns}, fingerprint "
        f"{latents.fingerprint[:16]}",
        f"latents: {channels} channels of {size[0]} x {size[1]}, {'with' if identity.views > 1 else 'without'} "
        f"mirrored ones, in {len(latents.record.chunks)} files",
        *_class_lines(latents.class_names, latents.class_labels),
    ]


def _common_lines(sizes: Sequence[tuple[int, int]], kinds: Counter[str], copies: int) -> list[str]:
    span = " x ".join(map(str, sizes[0])) + (f" to {' x '.join(map(str, sizes[-1]))}" if len(sizes) > 1 else "")
    return [
        f"sizes: {len(sizes)}, {span} (rows x columns)",
        "formats: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()),
        *([f"exact copies: {copies} (a split keeps them together)"] if copies else []),
    ]


def _findings(rejected: Sequence[RejectedFile], notes: Sequence[tuple[str, str]], listed: int | None) -> list[str]:
    findings = [f"unusable {r.path!r}: {r.reason}" for r in rejected if not r.other]
    findings += [f"note {path!r}: {note}" for path, note in notes]
    findings += [f"left out {r.path!r}: {r.reason}" for r in rejected if r.other]
    shown = findings if listed is None else findings[:listed]
    return shown + ([f"and {len(findings) - len(shown)} more"] if len(shown) < len(findings) else [])


def _class_lines(class_names: Sequence[str], class_labels: np.ndarray) -> list[str]:
    counts = np.bincount(class_labels, minlength=len(class_names)).tolist() if class_names else []
    return [f"classes: {len(class_names) or 'none'}"] + [
        f"  {label} {name!r}: {count} images" + ("" if count else "  <- empty")
        for label, (name, count) in enumerate(zip(class_names, counts, strict=True))
    ]
