"""Tar shards as an image set: one checked pass over each shard, stored, and then any image by a range of its shard.

Nothing is unpacked, and nothing is believed: what a range gives must have the checksum that the pass found.
"""

import bisect
import hashlib
import json
import multiprocessing
import os
import sys
import urllib.parse
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from smalti.data.changed import Tally
from smalti.data.decoding import UnusableImageError, centre_crop, decode
from smalti.data.folder import CACHE_BYTES, refuse_unusable
from smalti.data.folder_pass import RejectedFile, refuse_case_twins
from smalti.data.grouping import equal_rows, in_parts, is_among
from smalti.data.image_set import merge_twins
from smalti.data.index_file import cache_folder, parse_index, read_index, write_index
from smalti.data.read_ahead import ReadAhead
from smalti.data.shard_index import FOLDER, NAME, NUMBER, ShardIndex, compact, index_shard, restored, stored
from smalti.data.shard_manifest import check_manifest
from smalti.data.shard_names import KeyNames, ShardNames, SplitNames, key_of, starts_of
from smalti.data.shard_place import find_shards, names_all
from smalti.errors import DataError, SmaltiError, StorageError
from smalti.storage.objects import ByteStore, LocalStore, MissingObjectError

BLOCK, BLOCK_BYTES = 1024, 1 << 23  # neighbours of one shard, at most so many and in about so many bytes
BESIDE = ".smalti-index"  # folder of indices that travel with their shards
_SHOWN = 5
_SOURCES = {NUMBER: "a number", NAME: "a name", FOLDER: "the folder in their path"}


@dataclass(frozen=True, eq=False)
class ShardImages:
    """An `ImageSet` of tar shards. Below `CACHE_BYTES` its pixels stay in memory once they were read.

    Attributes:
        block_starts: first image of each block of neighbours of one shard.
        block_spans: int64 (blocks, 2): where in its shard each block begins and ends.
        wants_blocks: whether the shards lie in a store far away. Then blocks are what is fetched at once.
        shards: their indices, without the digests: those are needed for the fingerprint and to find twins only.
    """

    name: str
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    class_labels: np.ndarray
    item_names: Sequence[str]
    split_names: Sequence[str]
    fingerprint: str
    block_starts: np.ndarray
    block_spans: np.ndarray
    wants_blocks: bool
    store: ByteStore
    shards: tuple[ShardIndex, ...]
    starts: tuple[int, ...]
    ahead: ReadAhead | None = field(default=None, repr=False)
    kept: dict[int, np.ndarray] | None = field(default=None, repr=False)
    _tally: Tally = field(default_factory=Tally, repr=False)

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3) RGB of one image.

        Raises:
            ChangedFileError: the shard was changed or removed after the pass.
            DataError: this happened to more than 0.1 % of all reads, and more than once.
            StorageError: the store cannot be reached.
        """
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        self._tally.count_read()
        number = bisect.bisect_right(self.starts, index) - 1
        shard, row = self.shards[number], index - self.starts[number]
        try:
            data = self._bytes(index, shard, row)
            pixels = np.asarray(centre_crop(decode(data).image, self.image_size))
        except (UnusableImageError, MissingObjectError) as error:
            raise self._tally.failure(f"{self.store.place}: {self.item_names[index]!r}: {error}") from error
        if self.kept is not None:
            self.kept[index] = pixels
        return pixels

    def _bytes(self, index: int, shard: ShardIndex, row: int) -> bytes:
        start = int(shard.offset[row])
        stop = start + int(shard.size[row])
        low, high = map(int, self.block_spans[int(np.searchsorted(self.block_starts, index, side="right")) - 1])
        # In a shard whose images lie in another order than their keys, a block may be spread all over it.
        if self.ahead is None or high - low > 4 * BLOCK_BYTES:
            data = self.store.read(shard.shard, start, stop)
        else:
            data = self.ahead.read(shard.shard, start, stop, low, high)
        if zlib.crc32(data) != int(shard.crc[row]):
            if self.ahead is not None:
                self.ahead.forget(shard.shard, low)
            raise UnusableImageError("changed since it was checked")
        return data


def load_shards(
    spec: str | Path,
    image_size: tuple[int, int] | None,
    *,
    allow_empty: bool = False,
    skip_unreadable: bool = False,
    cache_bytes: int = CACHE_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ShardImages:
    """Check tar shards, as far as no stored index speaks for them, and make a set of them; see `load_image_set`.

    Args:
        cache_bytes: sets of at most this many bytes of pixels stay in memory.
        progress: called with (shards done, shards found).
    """
    store, names = find_shards(spec)
    shards = index_shards(store, names, whole=names_all(spec), progress=progress)
    where = store.place
    count = sum(map(len, shards))
    refuse_unusable(where, unusable(shards), count, skip_unreadable)
    if not count:
        raise DataError(f"{where}: no image in {len(shards)} tar shards; give shards of images")
    class_names, class_labels = classes(where, shards)
    _refuse_empty(where, class_names, class_labels, allow_empty)
    size = image_size or _common_size(where, shards)
    starts = starts_of(shards)
    block_starts, block_spans = _blocks(shards, starts)
    split_names, fingerprint = _split_names(shards), _fingerprint(shards, class_names, class_labels, size)
    shards = tuple(replace(shard, digest=np.empty((0, 2), np.uint64)) for shard in shards)
    return ShardImages(
        name=urllib.parse.urlsplit(where).path.rstrip("/").rpartition("/")[2] or where,
        image_size=size,
        class_names=class_names,
        class_labels=class_labels,
        item_names=_item_names(shards),
        split_names=split_names,
        fingerprint=fingerprint,
        block_starts=block_starts,
        block_spans=block_spans,
        wants_blocks=not isinstance(store, LocalStore),
        store=store,
        shards=shards,
        starts=starts,
        ahead=None if isinstance(store, LocalStore) else ReadAhead(store),
        kept={} if count * size[0] * size[1] * 3 <= cache_bytes else None,
    )


def index_shards(
    store: ByteStore,
    names: Sequence[str],
    *,
    whole: bool = False,
    beside: bool = False,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ShardIndex, ...]:
    """The index of each shard: the stored one where the shard is still the same, else from a pass over it.

    Each index is stored as soon as its shard is done, so that a pass which was stopped goes on where it was.

    Args:
        whole: these are all shards of the place; a manifest (`index.json`) may list no other ones.
        beside: store the indices beside the shards too, in `.smalti-index`, for whoever reads them next.
        processes: that look at shards at the same time; None = one for each core, at most 8.

    Raises:
        DamagedTarError: a shard is cut off or damaged.
        DataError: a shard is missing or not what the manifest says, or an example is spread over two shards.
        StorageError: the store cannot be reached, or an index cannot be stored.
    """
    if beside and not isinstance(store, LocalStore):
        raise DataError(f"{store.place}: indices can be stored beside shards of this machine only; copy them there")
    found: dict[str, ShardIndex] = {}
    with ThreadPoolExecutor(16, thread_name_prefix="smalti-index") as pool:
        for name, index in zip(names, pool.map(lambda name: _known(store, name), names), strict=True):
            if index is not None:
                found[name] = index
    missing = [name for name in names if name not in found]
    for done, (name, index) in enumerate(_passes(store, missing, processes), start=1):
        found[name] = compact(index)
        if progress:
            progress(len(names) - len(missing) + done, len(names))
    shards = tuple(found[name] for name in names)
    if beside:
        for index in shards:
            write_index(Path(store.place) / BESIDE / f"{index.shard}.index", stored(index))
    check_manifest(store, shards, whole=whole)
    _refuse_spread(store, shards)
    return shards


def index_path(store: ByteStore, name: str) -> Path:
    """Where the index of a shard is kept on this machine."""
    place = os.path.realpath(store.place) if isinstance(store, LocalStore) else store.place
    folder, file = (hashlib.sha256(os.fsencode(text)).hexdigest()[:24] for text in (place, name))
    return cache_folder() / "indices" / folder / f"{file}.index"


def _known(store: ByteStore, name: str) -> ShardIndex | None:
    kept = read_index(index_path(store, name))
    index = restored(kept, name) if kept else None
    if index is not None:
        return compact(index) if index.version == store.version(name) else None
    try:
        beside = parse_index(store.read(f"{BESIDE}/{name}.index"))
    except (MissingObjectError, StorageError):
        # Some stores forbid what is not there. Where nothing at all can be read, the pass will say so.
        return None
    index = restored(beside, name) if beside else None
    # Copied with its shard, whose time is another now; what is read later must still have its checksum.
    return compact(index) if index is not None and index.bytes == store.size(name) else None


def _passes(store: ByteStore, names: Sequence[str], processes: int | None) -> Iterator[tuple[str, ShardIndex]]:
    workers = min(processes or min(8, os.cpu_count() or 1), len(names))
    if workers <= 1 or sys.platform != "linux":
        for name in names:
            yield name, _pass(store, name)
        return
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. The children take no lock that a thread here could hold.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            try:
                yield from zip(names, pool.map(_pass, [store] * len(names), names), strict=True)
            except BrokenProcessPool:
                raise SmaltiError(
                    f"{store.place}: a process that checked shards was killed; what was checked is kept: start the "
                    f"same command again"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


def _pass(store: ByteStore, name: str) -> ShardIndex:
    index = index_shard(store, name)
    write_index(index_path(store, name), stored(index))
    return index


def unusable(shards: Iterable[ShardIndex]) -> list[RejectedFile]:
    """What should have been images, or labels of some."""
    return [RejectedFile(f"{s.shard}:{r.path}", r.reason) for s in shards for r in s.rejected if not r.other]


def classes(where: str, shards: Sequence[ShardIndex]) -> tuple[tuple[str, ...], np.ndarray]:
    """(names, int64 label of each image) of all shards together; both empty without classes.

    Raises:
        DataError: labels of several kinds, images without one among others, or names that differ by case.
    """
    counts, first = Counter[int](), dict[int, int]()
    for shard, start in zip(shards, starts_of(shards), strict=False):
        kinds = np.where(shard.label < 0, -1, shard.source.astype(np.int64))
        for kind in np.flatnonzero(np.bincount(kinds + 1)).tolist():
            is_kind = kinds == kind - 1
            counts[kind - 1] += int(is_kind.sum())
            first.setdefault(kind - 1, start + int(is_kind.argmax()))
    if len(counts) > 1:
        rare = min(sorted(counts), key=counts.__getitem__)
        usual = _SOURCES.get(max(sorted(counts), key=counts.__getitem__), "none")
        what = "no label" if rare < 0 else f"their label from {_SOURCES[rare]}"
        raise DataError(
            f"{where}: {counts[rare]} of {counts.total()} images have {what}, such as "
            f"{_item_names(shards)[first[rare]]!r}, where the others have {usual}; all need the same kind"
        )
    if not counts or -1 in counts:
        return (), np.zeros(0, np.int64)
    label = np.concatenate([shard.label for shard in shards], dtype=np.int64)
    if NUMBER in counts:
        return tuple(str(number) for number in range(int(label.max()) + 1)), label
    names = sorted({name for shard in shards for name in shard.label_names})
    refuse_case_twins(where, names)
    place = {name: number for number, name in enumerate(names)}
    labels = []
    for shard in shards:
        table = np.asarray([place[name] for name in shard.label_names], dtype=np.int64)
        labels.append(table[shard.label] if len(shard) else np.zeros(0, np.int64))
    return tuple(names), np.concatenate(labels)


def _refuse_spread(store: ByteStore, shards: Sequence[ShardIndex]) -> None:
    """A label in one shard whose image lies in another one: the shards were cut in the wrong place."""
    orphans = {
        key_of(r.path)[0]: (shard.shard, r.path)
        for shard in shards
        for r in shard.rejected
        if r.reason == "a label without an image"
    }
    if not orphans:
        return
    for shard in shards:
        for key in shard.keys:
            if key in orphans and orphans[key][0] != shard.shard:
                raise DataError(
                    f"{store.place}: the example {key!r} is spread over two shards: its image lies in "
                    f"{shard.shard!r}, {orphans[key][1]!r} in {orphans[key][0]!r}; make the shards again"
                )


def _refuse_empty(where: str, names: Sequence[str], labels: np.ndarray, allow_empty: bool) -> None:
    counts = np.bincount(labels, minlength=len(names)).tolist() if names else []
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty and not allow_empty:
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise DataError(
            f"{where}: no image of class {', '.join(map(repr, empty[:_SHOWN]))}{more}; add some, or set allow_empty"
        )


def _blocks(shards: Sequence[ShardIndex], starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(first image of each block, where each lies in its shard); the same wherever the shards lie."""
    firsts, spans = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    for shard, start in zip(shards, starts, strict=False):
        if not len(shard):
            continue
        offset = shard.offset.astype(np.int64)
        part = np.maximum.accumulate(offset) // BLOCK_BYTES
        new = (np.diff(part, prepend=-1) != 0) | (np.arange(len(shard)) % BLOCK == 0)
        first = np.flatnonzero(new)
        low = np.minimum.reduceat(offset, first)
        high = np.maximum.reduceat(offset + shard.size, first)
        firsts.append(start + first)
        spans.append(np.stack([low, high], axis=1))
    return np.concatenate(firsts), np.concatenate(spans)


def _common_size(where: str, shards: Sequence[ShardIndex]) -> tuple[int, int]:
    sizes = image_sizes(shards)
    if len(sizes) > 1:
        low, high = sizes[0], sizes[-1]
        raise DataError(
            f"{where}: the images have {len(sizes)} different sizes, from {low} to {high} (rows, columns); "
            f"set image_size"
        )
    return sizes[0]


def image_sizes(shards: Sequence[ShardIndex]) -> list[tuple[int, int]]:
    """Each (rows, columns) that occurs, rising."""
    found = set[int]()
    for shard in shards:
        # Two numbers as one: rows of a table are sorted a hundred times slower.
        sizes = shard.image_size.astype(np.int64)
        found.update(np.unique((sizes[:, 0] << 32) | sizes[:, 1]).tolist())
    return [(both >> 32, both & 0xFFFFFFFF) for both in sorted(found)]


def _item_names(shards: Sequence[ShardIndex]) -> ShardNames:
    return ShardNames([shard.shard for shard in shards], [shard.paths for shard in shards])


def _split_names(shards: Sequence[ShardIndex]) -> SplitNames:
    """The key of each image; images of equal bytes share one."""
    keys = [KeyNames(shard.paths) for shard in shards]
    own = SplitNames(keys, np.zeros(0, np.int64), np.zeros(0, np.int64))
    later, first = equal_rows([shard.digest for shard in shards])
    if not len(later):
        return own
    # Images without a twin still share a name with one, where a key comes in several shards. All that may have the name
    # of a twin are looked at as texts, and no others: of those, only a hash.
    hashes = np.empty(len(own), np.uint64)
    for start, part in zip(starts_of(keys), keys, strict=False):
        hashes[start : start + len(part)] = part.hashes()
    wanted = np.unique(hashes[np.concatenate([first, later])])
    places = np.flatnonzero(np.concatenate([is_among(part, wanted) for part in in_parts(hashes)]))
    content = places.copy()
    content[np.searchsorted(places, later)] = first
    names = [own.name(place) for place in places.tolist()]
    merged = merge_twins(names, content.tolist())
    having = dict(zip(reversed(names), reversed(places.tolist()), strict=True))
    instead = np.asarray([having[name] for name in merged], dtype=np.int64)
    other = instead != places
    return SplitNames(keys, places[other], instead[other])


def _fingerprint(
    shards: Sequence[ShardIndex], class_names: Sequence[str], labels: np.ndarray, size: tuple[int, int]
) -> str:
    digest = hashlib.sha256(json.dumps(["tar shards", sum(map(len, shards)), *size, list(class_names)]).encode())
    digest.update(np.ascontiguousarray(labels, "<i8").data)
    for shard in shards:
        digest.update(shard.paths.text)
        digest.update(shard.paths.ends.astype("<i8").tobytes())
        digest.update(shard.digest.astype("<u8").tobytes())
    return digest.hexdigest()
