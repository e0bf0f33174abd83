"""What the index of a large set costs before the first batch: time and memory to open, split, order, and draw from it.

The sets are made up: the names, labels, sizes and checksums of so many images, and no pixels. `shards` is tar shards
whose indices are stored; `latents` the index of a latent set; each is looked at in a process of its own, whose highest
memory is reported with and without what Python and its libraries take.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.cost.memory import peak_memory
from smalti.data.image_set import Catalogue
from smalti.data.index_file import PackedNames, write_index
from smalti.data.latent_record import (
    INDEX,
    RECORD,
    LatentIdentity,
    LatentRecord,
    StoredFile,
    index_tensors,
    record_bytes,
)
from smalti.data.latent_set import open_latents
from smalti.data.order import split, training_order
from smalti.data.shard_index import NUMBER, ShardIndex, stored
from smalti.data.shards import index_path, load_shards
from smalti.latents import CodecFacts
from smalti.storage.objects import LocalStore
from smalti.storage.tensors import file_pieces

SETS = ("shards", "latents")
COUNTS = (1_281_167, 14_197_122)  # ImageNet-1K and ImageNet-22K
_ROWS, _CLASSES, _IMAGE_BYTES = 10_000, {COUNTS[0]: 1000, COUNTS[1]: 21_841}, 110_000
_BATCH, _TWINS = 256, 1000  # one image in so many has the bytes of another one


def main(arguments: list[str]) -> int:
    """One JSON line for each set, then the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"some of {', '.join(SETS)}")
    parser.add_argument("--count", type=positive, action="append", help=f"images; default {COUNTS[0]} and {COUNTS[1]}")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    add_common_options(parser, precisions=["fp32"])
    options = parser.parse_args(arguments)
    if options.inside:
        kind, place = options.inside.split(":", 1)
        sys.stdout.write(json.dumps(_look(kind, Path(place))))
        return 0
    if unknown := [name for name in options.sets if name not in SETS]:
        parser.error(f"no set {', '.join(unknown)}; there is {', '.join(SETS)}")
    recorder = Recorder("scale", prepare(options), options.out)
    for count in options.count or COUNTS:
        for kind in options.sets or SETS:
            with tempfile.TemporaryDirectory(prefix="smalti-bench-") as place:
                environment = os.environ | {"XDG_CACHE_HOME": f"{place}/cache"}
                os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
                {"shards": _make_shards, "latents": _make_latents}[kind](Path(place) / "set", count)
                command = [sys.executable, "-m", "benchmarks", "scale", "--inside", f"{kind}:{place}/set"]
                done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                recorder.add(set=kind, count=count, **json.loads(done.stdout))
    names = ("open", "split", "balanced", "order", "batch")
    rows = [
        (r["set"], f"{r['count']:,}", *(f"{r[name]:.2f}" for name in names), f"{r['added_bytes'] / 1e9:.2f}")
        for r in recorder.rows
    ]
    sys.stdout.write("\n" + table(("set", "images", *(f"{name} s" for name in names), "GB added"), rows))
    return 0


def _look(kind: str, place: Path) -> dict[str, float]:
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], object]) -> object:
        begun = time.perf_counter()
        made = run()
        seconds[name] = time.perf_counter() - begun
        return made

    def work() -> None:
        catalogue = timed("open", lambda: open_latents(place) if kind == "latents" else load_shards(place, (64, 64)))
        assert isinstance(catalogue, Catalogue)
        sides = timed("split", lambda: split(catalogue, 0.01, 0, allow_empty=True))
        train = sides.train  # type: ignore[attr-defined]
        timed("balanced", lambda: training_order(catalogue, train, 0, class_balanced=True).at(5))
        order = timed("order", lambda: training_order(catalogue, train, 0, shuffle="blocks"))
        timed("batch", lambda: [order.at(position) for position in range(_BATCH)])  # type: ignore[attr-defined]

    peak = peak_memory(work, "cpu")
    return seconds | {"added_bytes": peak.added, "peak_bytes": peak.peak}


def _labels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, _CLASSES.get(count, 1000), count).astype(np.int32)


def _make_shards(folder: Path, count: int) -> None:
    """Empty tar files, and the indices of what might be in them."""
    folder.mkdir()
    store, labels, draw = LocalStore(folder), _labels(count), np.random.default_rng(1)
    for number, first in enumerate(range(0, count, _ROWS)):
        rows = min(_ROWS, count - first)
        name = f"train-{number:06}.tar"
        (folder / name).touch()
        os.truncate(folder / name, rows * _IMAGE_BYTES)
        digest = draw.integers(0, 1 << 62, (rows, 2), dtype=np.uint64)
        digest[::_TWINS] = 7, number % 100
        index = ShardIndex(
            shard=name,
            version=store.version(name),
            bytes=rows * _IMAGE_BYTES,
            paths=PackedNames.of(f"n{labels[i]:08}/n{labels[i]:08}_{i:08}.jpg" for i in range(first, first + rows)),
            keys=PackedNames.of(f"n{labels[i]:08}/n{labels[i]:08}_{i:08}" for i in range(first, first + rows)),
            offset=np.arange(rows, dtype=np.int64) * _IMAGE_BYTES,
            size=draw.integers(_IMAGE_BYTES // 2, _IMAGE_BYTES - 1024, rows),
            crc=draw.integers(0, 1 << 32, rows, dtype=np.uint32),
            digest=digest,
            image_size=draw.integers(64, 500, (rows, 2), dtype=np.int32),
            source=np.full(rows, NUMBER, np.int32),
            label=labels[first : first + rows],
            label_names=(),
            kinds=(("JPEG RGB", rows),),
            notes=(),
            rejected=(),
        )
        write_index(index_path(store, name), stored(index))


@dataclasses.dataclass
class _Names:
    """As much of a catalogue as the index of latents is made from."""

    class_names: Sequence[str]
    class_labels: np.ndarray
    item_names: Sequence[str]
    split_names: Sequence[str]


def _make_latents(folder: Path, count: int) -> None:
    """The record and the index of latents, without chunks."""
    folder.mkdir()
    labels = _labels(count)
    names = PackedNames.of(f"train-{i // _ROWS:06}.tar:n{labels[i]:08}_{i:08}.jpg" for i in range(count))
    splits = PackedNames.of(f"n{labels[i]:08}_{i:08}" for i in range(count))
    classes = tuple(f"n{label:08}" for label in range(int(labels.max()) + 1))
    identity = LatentIdentity(
        codec=CodecFacts(kind="autoencoder-kl", channels=4, factor=8),
        source="made up", source_fingerprint="", source_count=count, image_size=(256, 256), count=count,
        flips="stored", chunk_rows=2048, batch=4, precision="fp32", device="cpu", threads=1, torch="",
    )  # fmt: skip
    shaped = _Names(classes, labels, names, splits)
    checksums = torch.zeros(count, identity.views, dtype=torch.int64)
    digest, size = hashlib.sha256(), 0
    with (folder / INDEX).open("wb") as file:
        for piece in file_pieces(index_tensors(shaped, count, checksums)):  # type: ignore[arg-type]
            size += file.write(piece)
            digest.update(piece)
    chunks = tuple(
        StoredFile(bytes=8 + len(identity.rows(i)) * identity.row_bytes, sha256="", offset=8)
        for i in range(identity.chunks)
    )
    index = StoredFile(bytes=size, sha256=digest.hexdigest())
    record = LatentRecord(identity=identity, class_names=classes, smalti="", index=index, chunks=chunks)
    (folder / RECORD).write_bytes(record_bytes(record))
