"""`encode`: from images to a folder of latents, by one process or by many that never talk to each other.

As in `sample_set`, every process makes the chunks that nobody else makes, and who finds all of them stored writes the
index and the record. Killed and started again at any time, all of them end in the same bytes.
"""

import contextlib
import io
import os
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smalti.data import ImageSet, load_image_set, to_unit_range
from smalti.data.latent_record import (
    INDEX,
    MOMENTS,
    RECORD,
    Flips,
    LatentIdentity,
    LatentRecord,
    StoredFile,
    index_tensors,
    read_record,
    record_bytes,
)
from smalti.errors import CheckpointError, ConfigError, NumericError
from smalti.latents import Codec, load_codec
from smalti.latents.vae import rows_at_once
from smalti.sampling.record import first_difference
from smalti.storage import filesystem
from smalti.storage.chunks import ChunkStore, Claims, DamagedChunkError
from smalti.storage.filesystem import FileSystem, LocalFileSystem, make_folders, require_space, storage_errors
from smalti.storage.objects import open_store
from smalti.storage.replacing import replace_file
from smalti.storage.sealed import smalti_version
from smalti.storage.tensors import file_pieces, file_size
from smalti.training.device import autocast_dtype, resolve_device
from smalti.training.stop import StopRequest
from smalti.workflows.chunk_share import heed, others_missing, read_chunk_range
from smalti.workflows.out_folder import check_folder
from smalti.workflows.progress import ProgressReport
from smalti.world import World

MOST_CHUNK_BYTES, MOST_CHUNK_ROWS = 1 << 26, 4096
_READERS = 8  # threads that decode images while the network works; more than this and they wait for one another
_WAIT = 0.2  # seconds between two looks while another process writes the index


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What a user asks for.

    Args:
        source: image set, folder of images or tar shards, as `load_image_set` reads it.
        codec: as `load_codec` reads it.
        image_size: side in pixels, or rows and columns; None = as the set is.
        flips: stored = encode each mirrored image as well, so that training may mirror.
        limit: only the first so many images.
        batch: images in each call of the network; part of what makes the bits. None = by their size.
        chunks: `a:b`, the chunks that this process is to make, b not included; "" = whichever is missing.
        chunk_rows: images in a chunk; None = 64 MiB of latents, 4096 at most.
        threads: on a CPU; part of what makes the bits. None = as the set that is there, else torch's number.
    """

    source: str
    codec: str
    out: Path
    image_size: int | tuple[int, int] | None = None
    flips: Flips = "none"
    limit: int | None = None
    batch: int | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    chunks: str = ""
    chunk_rows: int | None = None
    threads: int | None = None
    skip_unreadable: bool = False


@dataclass(frozen=True)
class EncodeResult:
    """What became of the call.

    Attributes:
        record: complete, unless chunks of other processes are missing.
        note: one line when there was nothing to do, or when there is more to do than this process was told.
    """

    record: LatentRecord
    note: str = ""


def encode(settings: EncodeSettings, *, fs: FileSystem | None = None) -> EncodeResult:
    """Encode the images that are still missing, or this process's share of them, and finish the set when all are there.

    Args:
        fs: the file operations; tests put failures here.

    Raises:
        PreemptedError: it was asked to stop; chunks that are stored stay.
        SmaltiError: whatever the user can mend; nothing is written before all settings are known to be good.
    """
    fs = LocalFileSystem() if fs is None else fs
    place = World.launched()
    check_folder(settings.out, "--out")
    for name in ("limit", "batch", "chunk_rows", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    device = place.device(resolve_device(settings.device))
    dtype = autocast_dtype(settings.precision) or torch.float32
    codec = load_codec(settings.codec, device=device, dtype=dtype, rows=settings.batch)
    if codec.facts.kind == "pixels":
        raise ConfigError("--codec pixels: images need no encoding; train on them as they are")
    images = _images(settings, place)
    wanted = _record(settings, codec, images, device)
    if not (settings.out / RECORD).exists():
        _chunks_of(settings, wanted.identity)
    record = _settle(settings, wanted, fs)
    chosen = _chunks_of(settings, record.identity)
    store = ChunkStore(settings.out, record.identity.chunks, record.identity.digest, fs=fs)
    before = torch.get_num_threads()
    torch.set_num_threads(record.identity.threads)
    try:
        return _Work(settings.out, codec, images, record, store, chosen, place, fs).run()
    finally:
        torch.set_num_threads(before)


def _images(settings: EncodeSettings, place: World) -> ImageSet:
    with contextlib.ExitStack() as shown:
        report: list[ProgressReport] = []

        def progress(done: int, found: int) -> None:
            if place.rank == 0 and found >= _READERS * 100:
                if not report:
                    report.append(shown.enter_context(ProgressReport("looking at images", found, unit="files")))
                report[0].update(done)

        return load_image_set(
            settings.source, settings.image_size, skip_unreadable=settings.skip_unreadable, progress=progress
        )


def _record(settings: EncodeSettings, codec: Codec, images: ImageSet, device: torch.device) -> LatentRecord:
    rows, columns = images.image_size
    codec.facts.latent_shape(images.image_size)  # refuses what is no multiple of its factor
    count = min(len(images), settings.limit or len(images))
    identity = LatentIdentity(
        codec=codec.facts,
        source=settings.source,
        source_fingerprint=images.fingerprint,
        source_count=len(images),
        image_size=(rows, columns),
        count=count,
        flips=settings.flips,
        chunk_rows=settings.chunk_rows or 1,
        batch=settings.batch or rows_at_once(rows * columns),
        precision=settings.precision,
        device=device.type,
        threads=settings.threads or torch.get_num_threads(),
        torch=str(torch.__version__),
    )
    if settings.chunk_rows is None:
        fitting = max(1, MOST_CHUNK_BYTES // identity.row_bytes)
        identity = replace(identity, chunk_rows=min(fitting, MOST_CHUNK_ROWS))
    return LatentRecord(identity=identity, class_names=tuple(images.class_names), smalti=smalti_version())


def _settle(settings: EncodeSettings, wanted: LatentRecord, fs: FileSystem) -> LatentRecord:
    """The record of the folder, written by whoever comes first; what the user left open is as that one decided.

    Raises:
        ConfigError: the folder holds something else. CheckpointError: its record is damaged.
        StorageError: there is no room, or it cannot be written to.
    """
    out, identity = settings.out, wanted.identity
    with storage_errors(fs, out, 4096, "preparing the folder", "Choose another --out"):
        make_folders(fs, out)
        with Claims(out).hold("record"):
            if (out / RECORD).exists():
                try:
                    stored = read_record(open_store(out))
                except CheckpointError as error:
                    raise CheckpointError(f"{error}; choose another --out, or remove it") from error
                there = stored.identity
                same = replace(
                    identity,
                    source=there.source,
                    codec=replace(identity.codec, source=there.codec.source),
                    threads=settings.threads or there.threads,
                    chunk_rows=settings.chunk_rows or there.chunk_rows,
                )
                if difference := first_difference(there, same):
                    raise ConfigError(f"{out} holds other latents ({difference}); choose another --out")
                return stored
            if others := sorted(name for name in os.listdir(out) if not name.startswith(".")):
                raise ConfigError(f"{out} has files of something else, such as {others[0]}; choose another --out")
            require_space(fs, out, identity.count * identity.row_bytes + (1 << 16), f"{identity.count:,} latents")
            replace_file(fs, out / RECORD, [record_bytes(wanted)])
    return wanted


def _chunks_of(settings: EncodeSettings, identity: LatentIdentity) -> range:
    return read_chunk_range(
        settings.chunks, chunks=identity.chunks, count=identity.count, chunk_size=identity.chunk_rows
    )


@dataclass(frozen=True, eq=False)
class _Work:
    """One process's share of a set."""

    out: Path
    codec: Codec
    images: ImageSet
    record: LatentRecord
    store: ChunkStore
    wanted: range
    place: World
    fs: FileSystem

    def run(self) -> EncodeResult:
        identity = self.record.identity
        if self.record.complete and not self.store.missing():
            return EncodeResult(self.record, f"{self.out} is complete: {identity.count:,} examples, nothing to do")
        total = sum(len(identity.rows(index)) for index in self.wanted)
        shown = None if self.place.rank == 0 else io.StringIO()
        with StopRequest() as stop, ProgressReport("encoding", total, unit="images", out=shown) as progress:
            progress.continue_from(self._stored())
            while True:
                self._make_chunks(stop, progress)
                heed(stop, self.store, self.out)
                if missing := self.store.missing():
                    if not set(missing) & set(self.wanted):
                        return EncodeResult(self.record, others_missing(self.wanted, missing, identity.chunks))
                elif (done := self._finish(stop, progress)) is not None:
                    return EncodeResult(done)

    def _make_chunks(self, stop: StopRequest, progress: ProgressReport) -> None:
        start = self.place.rank * len(self.wanted) // self.place.size
        over = lambda: stop.received is not None  # noqa: E731
        with (
            ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers,
            contextlib.closing(self.store.work(self.wanted, start=start, over=over)) as chunks,
        ):
            for index in chunks:
                self.store.write(index, {MOMENTS: self._encode(index, readers, stop, progress)})
                progress.update(self._stored())

    def _encode(self, index: int, readers: ThreadPoolExecutor, stop: StopRequest, progress: ProgressReport) -> Tensor:
        """The posteriors of a chunk, float16 (rows, views, 2, C, H, W)."""
        identity, rows, stored = self.record.identity, self.record.identity.rows(index), self._stored()
        moments = torch.empty(len(rows), identity.views, 2, *identity.latent_shape, dtype=torch.float16)
        done = 0
        for pixels in self._read(rows, readers):
            heed(stop, self.store, self.out)
            images = to_unit_range(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
            for view in range(identity.views):
                found = self.codec.encode(images.flip(-1) if view else images)
                moments[done : done + len(images), view] = torch.stack(found, dim=1).half().cpu()
            done += len(images)
            progress.update(stored + done)
        if not bool(torch.isfinite(moments).all()):
            raise NumericError(
                f"the latents of images {rows.start} to {rows.stop - 1} have values that float16 does not hold, and "
                "are not stored; check the codec's scaling_factor, or try --precision fp32"
            )
        return moments

    def _read(self, rows: range, readers: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """uint8 (B, H, W, 3), a batch at a time; the next one is decoded while the network works."""
        step = self.record.identity.batch
        waiting: list[Future[np.ndarray]] = []
        for start in range(rows.start, rows.stop, step):
            before = waiting
            waiting = [readers.submit(self.images.read, i) for i in range(start, min(start + step, rows.stop))]
            if before:
                yield np.stack([future.result() for future in before])
        yield np.stack([future.result() for future in waiting])

    def _finish(self, stop: StopRequest, progress: ProgressReport) -> LatentRecord | None:
        """Write index and record; None while another process does, or if a chunk must be made again first."""
        claim = self.store.claim_finish()
        if claim is None:
            time.sleep(_WAIT)
            return None
        try:
            stored = read_record(open_store(self.out))
            # Not if it was complete from the start: then a chunk was made again, and may have become another one.
            if stored.complete and not self.record.complete:
                return stored
            done = self._write_outputs(stop)
            claims = Claims(self.out)
            for left in self.out.glob(".claim-[0-9]*"):
                # Of whoever died between storing a chunk and letting go of it.
                if (claim_left := claims.take(left.name.removeprefix(".claim-"))) is not None:
                    claim_left.release(remove=True)
            return done
        except DamagedChunkError as error:
            progress.note(f"{error}; it is made again")
            self.store.discard(error.index)
            return None
        finally:
            claim.release(remove=True)

    def _files(self) -> tuple[StoredFile, ...]:
        """Size and hash of each chunk as it lies there."""
        files = []
        for index in range(self.record.identity.chunks):
            found = filesystem.read_record(self.store.path(index))
            files.append(StoredFile(bytes=found.bytes, sha256=found.sha256, offset=_offset(self.store.path(index))))
        return tuple(files)

    def _write_outputs(self, stop: StopRequest) -> LatentRecord:
        identity = self.record.identity
        checksums = torch.empty(identity.count, identity.views, dtype=torch.int64)
        for index in range(identity.chunks):
            heed(stop, self.store, self.out)
            moments = self.store.read(index)[MOMENTS].numpy()
            for row, views in zip(identity.rows(index), moments, strict=True):
                checksums[row] = torch.tensor([zlib.crc32(view.tobytes()) for view in views])
        tensors = index_tensors(self.images, identity.count, checksums)
        advice = "The chunks themselves are stored; make room and run the same command again"
        with storage_errors(self.fs, self.out, file_size(tensors), "writing the index", advice):
            index_file = replace_file(self.fs, self.out / INDEX, file_pieces(tensors))
            done = replace(
                self.record,
                index=StoredFile(bytes=index_file.bytes, sha256=index_file.sha256),
                chunks=self._files(),
            )
            replace_file(self.fs, self.out / RECORD, [record_bytes(done)])
        return done

    def _stored(self) -> int:
        missing = set(self.store.missing(self.wanted))
        return sum(len(self.record.identity.rows(index)) for index in self.wanted if index not in missing)


def _offset(path: Path) -> int:
    """Where the rows begin: behind the header, because the widest type of a safetensors file of ours comes first."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
