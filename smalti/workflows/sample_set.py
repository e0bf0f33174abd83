"""`sample`: a folder of images, by one process or by many that never talk to each other.

The set is cut into chunks (`smalti.storage.chunks`); every process makes those that nobody else makes, and who finds
all of them stored writes the outputs. So any number of processes, killed and started again at any time, end in the
same bytes.
"""

import contextlib
import hashlib
import io
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from smalti.config import to_dict
from smalti.data import to_uint8, to_unit_range
from smalti.data.npz import write_images
from smalti.errors import ConfigError, NumericError, StorageError
from smalti.report.files import write_text
from smalti.report.images import save_grid
from smalti.sampling import SAMPLERS
from smalti.sampling.record import RECORD, OutputFile, SampleRecord, read_record, record_bytes
from smalti.storage.chunks import ChunkStore, DamagedChunkError
from smalti.storage.filesystem import FileSystem, LocalFileSystem, storage_errors, write_file
from smalti.storage.replacing import replace_file
from smalti.training.stop import StopRequest
from smalti.workflows.chunk_share import heed, others_missing
from smalti.workflows.progress import ProgressReport
from smalti.workflows.sample import sample
from smalti.workflows.sample_folder import GRID, NPZ, YAML, open_store, png_name, settle
from smalti.workflows.sample_request import SampleRequest, SampleSettings, chunks_of, read_request
from smalti.world import World

GRID_IMAGES = 64
_LISTED = 1000  # labels in sample.yaml; it is for people
_UNFINISHED = ".tmp-png-"
_WAIT = 0.2  # seconds between two looks while another process writes the outputs


@dataclass(frozen=True)
class SampleResult:
    """What became of the call.

    Attributes:
        outputs: what people open, the grid first; empty while chunks are missing.
        note: one line when there was nothing to do, or when there is more to do than this process was told.
    """

    outputs: tuple[Path, ...]
    note: str = ""


def sample_set(settings: SampleSettings, *, fs: FileSystem | None = None) -> SampleResult:
    """Make the missing images of a set, or this process's share of them, and the outputs when all are there.

    The same call again, here or in any number of processes at once, goes on where the others are. PNGs are named by
    seed, with a grid of the first 64 and `sample.yaml` for people; `samples.npz` has ADM's layout.

    Args:
        fs: the file operations; tests put failures here.

    Raises:
        PreemptedError: it was asked to stop; chunks that are stored stay.
        SmaltiError: whatever the user can mend; nothing is written before all settings are known to be good.
    """
    fs = LocalFileSystem() if fs is None else fs
    place = World.launched()
    request = read_request(settings, place)
    record = settle(settings, request.record, fs)
    wanted = chunks_of(settings, record.identity)
    store = open_store(record.identity, settings.out, fs)
    before = torch.get_num_threads()
    torch.set_num_threads(record.identity.threads)
    try:
        return _Work(request, record, store, wanted, place, fs).run()
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class _Work:
    """One process's share of a set."""

    request: SampleRequest
    record: SampleRecord
    store: ChunkStore
    wanted: range
    place: World
    fs: FileSystem

    @property
    def out(self) -> Path:
        return self.request.settings.out

    def run(self) -> SampleResult:
        identity = self.record.identity
        if self.record.complete:
            self.store.clear()  # in case that whoever finished was killed before
            return SampleResult(self._results(), f"{self.out} is complete: {identity.count:,} samples, nothing to do")
        total = sum(len(self._rows(index)) for index in self.wanted)
        shown = None if self.place.rank == 0 else io.StringIO()
        with StopRequest() as stop, ProgressReport("sampling", total, unit="images", out=shown) as progress:
            progress.continue_from(self._images_stored())
            while True:
                self._make_chunks(stop, progress)
                if self._complete():
                    break
                heed(stop, self.store, self.out)
                missing = self.store.missing()
                if not missing:
                    self._finish(stop, progress)
                elif not set(missing) & set(self.wanted):
                    return SampleResult((), others_missing(self.wanted, missing, identity.chunks))
        self.store.clear()
        return SampleResult(self._results())

    def _make_chunks(self, stop: StopRequest, progress: ProgressReport) -> None:
        start = self.place.rank * len(self.wanted) // self.place.size
        over = lambda: stop.received is not None or self._complete()  # noqa: E731
        with contextlib.closing(self.store.work(self.wanted, start=start, over=over)) as chunks:
            for index in chunks:
                images = self._draw(index, stop, progress)
                try:
                    self.store.write(index, {"images": images})
                except StorageError:
                    # Where locks are not heard, others may have made this chunk too, finished all and cleared up.
                    if not self._complete():
                        raise
                progress.update(self._images_stored(), self._detail())

    def _draw(self, index: int, stop: StopRequest, progress: ProgressReport) -> Tensor:
        """The images of a chunk, uint8 (B, 3, H, W)."""
        identity, rows, stored = self.record.identity, self._rows(index), self._images_stored()
        seeds = [self.request.seeds[row] for row in rows]

        def on_step(done: int, total: int, _: Any) -> None:
            heed(stop, self.store, self.out)
            if done < total:
                progress.update(stored + len(rows) * done // total, self._detail())

        batches = sample(
            self.request.source,
            seeds,
            None if self.request.class_labels is None else [self.request.class_labels[row] for row in rows],
            identity.sampling,
            micro_batch=identity.micro_batch,
            device=self.request.device,
            precision=identity.precision,
            on_step=on_step,
        )
        images = torch.cat([batch.images for batch in batches])
        if not bool(torch.isfinite(images).all()):
            raise NumericError(
                f"the samples of seeds {seeds[0]} to {seeds[-1]} have values that are not finite, and are not stored; "
                "check the model, or try --precision fp32 and a smaller guidance scale"
            )
        return to_uint8(images)

    def _finish(self, stop: StopRequest, progress: ProgressReport) -> None:
        """Write the outputs, if no other process does so."""
        claim = self.store.claim_finish()
        if claim is None:
            time.sleep(_WAIT)
            return
        with claim:
            if self._complete():
                return
            try:
                self._write_outputs(stop)
            except DamagedChunkError as error:
                progress.note(f"{error}; it is made again")
                self.store.discard(error.index)

    def _write_outputs(self, stop: StopRequest) -> None:
        identity, pixels, outputs = self.record.identity, hashlib.sha256(), list[OutputFile]()
        first = list[np.ndarray]()

        def images() -> Iterator[np.ndarray]:
            """(B, H, W, 3), chunk by chunk; the first time through, looked at as well."""
            looked = not first
            for index in range(identity.chunks):
                heed(stop, self.store, self.out)
                stored = self.store.read(index)["images"].permute(0, 2, 3, 1).contiguous().numpy()
                if looked:
                    pixels.update(stored.data)
                    if sum(map(len, first)) < GRID_IMAGES:
                        first.append(stored)
                yield stored

        if "npz" in identity.save:
            count, size = identity.count, identity.image_size
            file = write_images(
                self.out / NPZ,
                images(),
                count=count,
                image_size=size,
                class_labels=self.request.class_labels,
                fs=self.fs,
            )
            outputs.append(OutputFile(name=NPZ, bytes=file.bytes, sha256=file.sha256))
        if "png" in identity.save:
            outputs.append(self._write_pngs(images()))
        shown = torch.from_numpy(np.concatenate(first)[:GRID_IMAGES]).permute(0, 3, 1, 2)
        save_grid(to_unit_range(shown), self.out / GRID, columns=max(1, round(len(shown) ** 0.5)))
        write_text(self.out / YAML, yaml.safe_dump(self._described(), sort_keys=False))
        done = replace(self.record, outputs=tuple(outputs), images_sha256=pixels.hexdigest())
        with storage_errors(self.fs, self.out, 4096, f"writing {RECORD}", "The samples themselves are stored"):
            replace_file(self.fs, self.out / RECORD, [record_bytes(done)])

    def _write_pngs(self, chunks: Iterator[np.ndarray]) -> OutputFile:
        digest, size, seeds = hashlib.sha256(), 0, iter(self.request.seeds)
        with storage_errors(self.fs, self.out, 0, "writing images", "Chunks stored before are untouched; make room"):
            for path in self.out.glob(f"{_UNFINISHED}*"):  # of a finisher that was killed
                with contextlib.suppress(FileNotFoundError):
                    self.fs.remove_file(path)
            for images in chunks:
                for image in images:
                    buffer = io.BytesIO()
                    Image.fromarray(image).save(buffer, format="PNG")
                    temporary = self.out / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}"
                    file = write_file(self.fs, temporary, [buffer.getvalue()])
                    self.fs.rename(temporary, self.out / png_name(next(seeds)))
                    digest.update(file.sha256.encode())
                    size += file.bytes
                self.fs.sync_folder(self.out)
        return OutputFile(name="SEED.png", bytes=size, sha256=digest.hexdigest())

    def _described(self) -> dict[str, Any]:
        """`sample.yaml`: the settings, for people."""
        identity = self.record.identity
        labels = self.request.class_labels
        listed = labels is None or len(labels) <= _LISTED
        return {
            "model": self.record.model.path,
            "seeds": identity.seeds,
            "labels": identity.label_rule.rule,
            **({"class_labels": labels} if listed else {}),
            "sampling": to_dict(identity.sampling),
            # what else decides the bits
            "micro_batch": identity.micro_batch,
            "precision": identity.precision,
            "inference": identity.inference,
            "decoder": identity.decoder,
            "device": identity.device,
            "threads": identity.threads,
            "torch": identity.torch,
        }

    def _results(self) -> tuple[Path, ...]:
        names = [GRID, *([NPZ] if "npz" in self.record.identity.save else [])]
        return tuple(self.out / name for name in names)

    def _complete(self) -> bool:
        """Whether somebody has written the outputs; asked of the disk each time."""
        stored = read_record(self.out)
        if stored.identity != self.record.identity:
            raise ConfigError(f"{self.out} was overwritten by another set of samples meanwhile")
        return stored.complete

    def _rows(self, index: int) -> range:
        size = self.record.identity.chunk_size
        return range(index * size, min((index + 1) * size, self.record.identity.count))

    def _images_stored(self) -> int:
        missing = set(self.store.missing(self.wanted))
        return sum(len(self._rows(index)) for index in self.wanted if index not in missing)

    def _detail(self) -> str:
        sampling = self.record.identity.sampling
        return f"{SAMPLERS[sampling.sampler].evaluations(sampling.num_inference_steps)} evaluations an image"
