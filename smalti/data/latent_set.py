"""Latents made once by `smalti encode`, and read example by example: from a folder, or by byte ranges from a store."""

import hashlib
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
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
from smalti.data.order import Order
from smalti.errors import ConfigError, DataError
from smalti.latents import CodecFacts
from smalti.storage.objects import ByteStore, LocalStore, MissingObjectError, is_url, open_store
from smalti.streams import AUGMENT, POSTERIOR, generator, key

HELD_BYTES = 1 << 28  # sets up to this size are held in memory; of larger remote ones, as much of what was read last
_WINDOW_BYTES = 1 << 22  # of one read from a store that is not this machine's, and of a block of `BlockOrder`


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
        self._forget()

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

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Float[Tensor, "N 2 C H W"]:
        """Mean and standard deviation of these examples, float32.

        Args:
            views: of each: 0 = as it is, 1 = mirrored.

        Raises:
            DataError: bytes are not those that were written, or a file is gone.
            StorageError: the store cannot be reached.
        """
        identity = self.record.identity
        rows = np.empty((len(indices), identity.view_bytes), dtype=np.uint8)
        for row, index, view in zip(rows, indices, views, strict=True):
            row[:] = self._posterior(index, view)
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

    def _posterior(self, index: int, view: int) -> np.ndarray:
        identity = self.record.identity
        if not (0 <= index < identity.count and 0 <= view < identity.views):
            raise IndexError(f"example {index}, view {view} of {identity.count} examples with {identity.views}")
        chunk, row = divmod(index, identity.chunk_rows)
        first = row // self._window_rows * self._window_rows
        window = self._window(chunk, first, min(first + self._window_rows, len(identity.rows(chunk))))
        start = (row - first) * identity.row_bytes + view * identity.view_bytes
        found = window[start : start + identity.view_bytes]
        if zlib.crc32(found) != int(self._index.crc32[index, view]):
            self._forget()
            raise self._damaged(chunk, f"example {index} is not as it was written")
        return np.frombuffer(found, dtype=np.uint8)

    @cached_property
    def _window_rows(self) -> int:
        """Examples that are read together: all of a chunk, one, or what is worth a request to a store."""
        identity = self.record.identity
        if self._small:
            return identity.chunk_rows
        return 1 if isinstance(self.store, LocalStore) else self._block_rows

    @cached_property
    def _block_rows(self) -> int:
        return max(1, _WINDOW_BYTES // self.record.identity.row_bytes)

    @cached_property
    def _small(self) -> bool:
        return sum(file.bytes for file in self.record.chunks) <= HELD_BYTES

    def _window(self, chunk: int, first: int, stop: int) -> memoryview:
        """The bytes of some rows, kept if they may be wanted soon."""
        if self._window_rows == 1:
            return self._read(chunk, first, stop)
        with self._lock:
            if (chunk, first) in self._held:
                self._held.move_to_end((chunk, first))
                return self._held[chunk, first]
        data = self._read(chunk, first, stop)
        with self._lock:
            self._held[chunk, first] = data
            while sum(map(len, self._held.values())) > HELD_BYTES + _WINDOW_BYTES:
                self._held.popitem(last=False)
        return data

    def _read(self, chunk: int, first: int, stop: int) -> memoryview:
        name, file, width = chunk_name(chunk), self.record.chunks[chunk], self.record.identity.row_bytes
        self._check_size(chunk)
        try:
            if self._small and isinstance(self.store, LocalStore):
                data = self.store.read(name)
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise self._damaged(chunk, "its sha256 is not the one that was written")
                return memoryview(data)[file.offset + first * width : file.offset + stop * width]
            return memoryview(self.store.read(name, file.offset + first * width, file.offset + stop * width))
        except MissingObjectError as error:
            raise self._damaged(chunk, str(error)) from error

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

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[int, int], memoryview] = OrderedDict()
        self._sized: set[int] = set()

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
        mean, std = self.latents.moments(indices, views).unbind(1)
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
