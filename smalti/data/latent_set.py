"""Latents made once by `smalti encode`, and read example by example: from a folder, or by byte ranges from a store."""

import hashlib
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from smalti.data.examples import ExampleBatch
from smalti.data.image_set import Catalogue
from smalti.data.latent_index import LatentIndex, read_index
from smalti.data.latent_record import RECORD, LatentRecord, chunk_name, read_record
from smalti.data.order import BlockOrder, Order
from smalti.data.read_ahead import ReadAhead, pays
from smalti.errors import ConfigError, DataError
from smalti.latents import CodecFacts
from smalti.storage.objects import ByteStore, LocalStore, MissingObjectError, is_url, open_store
from smalti.streams import AUGMENT, POSTERIOR, generator, key

HELD_BYTES = 1 << 28  # sets up to this size are held in memory
_BLOCK_BYTES = 1 << 22  # of a block of `BlockOrder`, the most that one request asks of a larger set in a store
_AT_ONCE = 16  # requests to a store

_Posterior = tuple[int, int]  # index and view


def is_latents(spec: str | Path) -> bool:
    """Whether a latent set lies there, finished or not.

    Raises:
        StorageError: the store cannot be reached.
    """
    if not is_url(spec):
        return (Path(spec) / RECORD).is_file()
    if str(spec).partition("?")[0].endswith(".tar"):  # some stores forbid what is not there, which would be an error
        return False
    try:
        open_store(spec).size(RECORD)
    except MissingObjectError:
        return False
    return True


def open_latents(place: str | Path) -> "LatentSet":
    """A latent set, its index read and compared with its hash; of the chunks nothing is read yet.

    Args:
        place: a folder, or a URL such as `s3://bucket/latents` or `https://host/latents`.

    Raises:
        DataError: there is none, it is not finished, or a file of it is damaged.
        CheckpointError: its record is damaged or of a newer format. StorageError: the store cannot be reached.
    """
    store = open_store(place)
    try:
        record = read_record(store)
    except MissingObjectError as error:
        raise DataError(f"{store.place} holds no latents ({RECORD} is missing); make some with `smalti encode`"
                        ) from error  # fmt: skip
    if record.index is None:
        raise DataError(f"{store.place} is not finished; run the `smalti encode` command that began it again")
    return LatentSet(store, record, read_index(store, record))


class LatentSet:
    """A catalogue of latents; see `open_latents`. May be used from several threads, and pickled."""

    def __init__(self, store: ByteStore, record: LatentRecord, index: LatentIndex) -> None:
        self.store, self.record, self._index = store, record, index
        self._lock = threading.Lock()
        self._held: dict[int, memoryview] = {}  # rows of chunks
        self._sized: set[int] = set()
        self._ahead = ReadAhead(store)

    def __len__(self) -> int:
        return self.record.identity.count

    @property
    def name(self) -> str:
        return self.store.place.rstrip("/").rpartition("/")[2]

    @property
    def codec(self) -> CodecFacts:
        return self.record.identity.codec

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.record.class_names

    @property
    def class_labels(self) -> np.ndarray:
        return self._index.class_labels

    @property
    def item_names(self) -> Sequence[str]:
        return self._index.item_names

    @property
    def split_names(self) -> Sequence[str]:
        return self._index.split_names

    @cached_property
    def fingerprint(self) -> str:
        return self.record.fingerprint

    @cached_property
    def block_starts(self) -> np.ndarray:
        """Stretches that are read at once from a store; see `smalti.data.order.Blocked`."""
        identity = self.record.identity
        return np.concatenate(
            [np.arange(r.start, r.stop, self._block_rows) for r in map(identity.rows, range(identity.chunks))]
        )

    @property
    def wants_blocks(self) -> bool:
        """Whether single examples are slow to read: from another machine, and too many to be held."""
        return not self._small and not isinstance(self.store, LocalStore)

    def moments(
        self, indices: Sequence[int], views: Sequence[int], *, nearby: bool = False
    ) -> Float[Tensor, "N 2 C H W"]:
        """Mean and standard deviation of these examples, float32. From a store, several requests are made at a time.

        Args:
            views: of each: 0 = as it is, 1 = mirrored.
            nearby: others of the same blocks will be asked for soon, as `BlockOrder` does: what is read from a store
                is read as whole blocks, and the last of them are held.

        Raises:
            DataError: bytes are not those that were written, or a file is gone.
            StorageError: the store cannot be reached.
        """
        identity = self.record.identity
        rows = np.empty((len(indices), identity.view_bytes), dtype=np.uint8)
        wanted: dict[_Posterior, list[int]] = {}
        blocks: dict[tuple[int, int], list[_Posterior]] = {}
        for place, (index, view) in enumerate(zip(indices, views, strict=True)):
            if not (0 <= index < identity.count and 0 <= view < identity.views):
                raise IndexError(f"example {index}, view {view} of {identity.count} examples with {identity.views}")
            if (index, view) not in wanted:
                chunk, row = divmod(index, identity.chunk_rows)
                blocks.setdefault((chunk, row // self._block_rows * self._block_rows), []).append((index, view))
            wanted.setdefault((index, view), []).append(place)

        def fill(block: tuple[int, int]) -> None:
            for posterior, found in zip(blocks[block], self._posteriors(*block, blocks[block], nearby), strict=True):
                rows[wanted[posterior]] = np.frombuffer(found, dtype=np.uint8)

        if self.wants_blocks and len(blocks) > 1:
            # Threads of this call alone: a process that is forked between two calls has nothing to inherit.
            with ThreadPoolExecutor(min(_AT_ONCE, len(blocks)), thread_name_prefix="smalti-latents") as pool:
                for _ in pool.map(fill, blocks):
                    pass
        else:
            for block in blocks:
                fill(block)
        stored = torch.from_numpy(rows).view(torch.float16).reshape(len(indices), 2, *identity.latent_shape)
        return stored.float()

    def check(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every byte; one line for each chunk that is not as it was written.

        Args:
            progress: called with (chunks done, chunks in all).
        """
        found = []
        for number, file in enumerate(self.record.chunks):
            name = chunk_name(number)
            try:
                data = self.store.read(name)
            except DataError as error:
                found.append(f"{name}: {error}")
            else:
                if len(data) != file.bytes:
                    found.append(f"{name} has {len(data):,} bytes, {file.bytes:,} were written")
                elif hashlib.sha256(data).hexdigest() != file.sha256:
                    found.append(f"{name}: its sha256 is not the one that was written")
            if progress:
                progress(number + 1, len(self.record.chunks))
        return found

    def _posteriors(
        self, chunk: int, first: int, posteriors: Sequence[_Posterior], nearby: bool
    ) -> list[bytes | memoryview]:
        """The bytes of some posteriors of the block that begins at row `first` of a chunk."""
        identity, file = self.record.identity, self.record.chunks[chunk]
        width, row_bytes, rows = identity.view_bytes, identity.row_bytes, identity.rows(chunk)
        starts = [file.offset + (index - rows.start) * row_bytes + view * width for index, view in posteriors]
        low, high = (file.offset + row * row_bytes for row in (first, min(first + self._block_rows, len(rows))))
        try:
            if self._small:
                held = self._chunk(chunk)
                found: list[bytes | memoryview] = [held[at - file.offset :][:width] for at in starts]
            else:
                found = self._ranges(chunk, starts, width, (low, high) if nearby else None)
        except MissingObjectError as error:
            raise self._damaged(chunk, str(error)) from error
        for (index, view), data in zip(posteriors, found, strict=True):
            if zlib.crc32(data) != int(self._index.crc32[index, view]):
                with self._lock:
                    self._held.pop(chunk, None)
                self._ahead.forget(chunk_name(chunk), low)
                raise self._damaged(chunk, f"example {index} is not as it was written")
        return found

    def _ranges(
        self, chunk: int, starts: Sequence[int], width: int, block: tuple[int, int] | None
    ) -> list[bytes | memoryview]:
        """So many bytes from each of these places of a file on, from `block` if it is to be held."""
        name = chunk_name(chunk)
        self._check_size(chunk)
        if self.wants_blocks and block:
            return [self._ahead.read(name, at, at + width, *block) for at in starts]
        low, high = min(starts), max(starts) + width
        if self.wants_blocks and pays(1, high - low, len(starts), len(starts) * width):
            data = memoryview(self.store.read(name, low, high))
            return [data[at - low :][:width] for at in starts]
        return [self.store.read(name, at, at + width) for at in starts]

    @cached_property
    def _block_rows(self) -> int:
        return max(1, _BLOCK_BYTES // self.record.identity.row_bytes)

    @cached_property
    def _small(self) -> bool:
        return sum(file.bytes for file in self.record.chunks) <= HELD_BYTES

    def _chunk(self, chunk: int) -> memoryview:
        """All rows of a chunk, held from then on."""
        with self._lock:
            if chunk in self._held:
                return self._held[chunk]
        name, file, identity = chunk_name(chunk), self.record.chunks[chunk], self.record.identity
        stop = file.offset + len(identity.rows(chunk)) * identity.row_bytes
        self._check_size(chunk)
        if isinstance(self.store, LocalStore):
            data = self.store.read(name)
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise self._damaged(chunk, "its sha256 is not the one that was written")
            rows = memoryview(data)[file.offset : stop]
        else:
            rows = memoryview(self.store.read(name, file.offset, stop))
        with self._lock:
            self._held[chunk] = rows
        return rows

    def _check_size(self, chunk: int) -> None:
        """Once for each chunk: an older or a longer file has its rows at other places."""
        if chunk in self._sized:
            return
        try:
            size = self.store.size(chunk_name(chunk))
        except MissingObjectError as error:
            raise self._damaged(chunk, str(error)) from error
        if size != self.record.chunks[chunk].bytes:
            raise self._damaged(chunk, f"{size:,} bytes, {self.record.chunks[chunk].bytes:,} were written")
        self._sized.add(chunk)

    def _damaged(self, chunk: int, reason: str) -> DataError:
        return DataError(
            f"{self.store.place}: {chunk_name(chunk)} is damaged ({reason}); delete it and run the `smalti encode` "
            "command again, or copy it again"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentSet, (self.store, self.record, self._index)


@dataclass(frozen=True, eq=False)
class LatentExamples:
    """Latents as training sees them.

    Args:
        posterior: sample = drawn anew each time an example comes up, as the papers' loops do by encoding each time;
            mean = always the mean.
    """

    latents: LatentSet
    posterior: Literal["sample", "mean"] = "sample"

    @property
    def catalogue(self) -> Catalogue:
        return self.latents

    @property
    def codec(self) -> CodecFacts:
        return self.latents.codec

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.latents.record.identity.latent_shape

    @property
    def can_flip(self) -> bool:
        return self.latents.record.identity.flips == "stored"

    def load(self, order: Order, positions: Sequence[int], *, flip: bool, seed: int) -> ExampleBatch:
        """As `Examples.load`; the noise of the posterior is keyed by (seed, position), so it is new in each epoch.

        Raises:
            ConfigError: mirrored latents are asked for, and only some of the images as they are were encoded.
            DataError: bytes of the set are damaged.
        """
        if flip and not self.can_flip:
            raise ConfigError(
                f"{self.latents.name} was encoded without mirrored images, and latents cannot be mirrored afterwards: "
                "encode again with --flips stored, or train without flips"
            )
        places = [order.at(position) for position in positions]
        indices = [index for _, index in places]
        views = [key(seed, AUGMENT, epoch, index) & 1 if flip else 0 for epoch, index in places]
        mean, std = self.latents.moments(indices, views, nearby=isinstance(order, BlockOrder)).unbind(1)
        if self.posterior == "sample":
            eps = torch.empty_like(mean)
            for row, position in zip(eps, positions, strict=True):
                row.normal_(generator=generator(seed, POSTERIOR, position))
            mean = mean + std * eps
        labels = torch.from_numpy(self.latents.class_labels[indices]) if self.latents.class_names else None
        return ExampleBatch(mean.contiguous(), labels, torch.tensor(indices, dtype=torch.int64))

    def x0(self, indices: Iterable[int]) -> Float[Tensor, "N C H W"]:
        chosen = [int(index) for index in indices]
        return self.latents.moments(chosen, [0] * len(chosen))[:, 0].contiguous()
