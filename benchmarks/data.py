"""How fast examples come: a folder of files, tar shards, latents, beside plain Pillow decoding and cropping.

Photographs are made up: fields of smooth colour with noise on them, of about 400 x 350 pixels and 100 KB as JPEG, as
those of ImageNet are. Every way brings the same images to the same size; ways take turns, and a ratio compares
neighbours in time. All is one worker's speed: one process, one thread. `workers` is the wall time of a training process
that only waits for its worker, without the start; the others are CPU time.
"""

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.data import SampleOrder, load_batch
from smalti.data.decoding import centre_crop
from smalti.data.examples import Examples
from smalti.data.folder import load_folder
from smalti.data.open_examples import load_examples
from smalti.data.shards import load_shards
from smalti.errors import ConfigError
from smalti.training.prefetch import prefetched

WORK = {
    "pillow": "Image.open, convert, centre crop: what the others stand beside",
    "folder": "files by their index: read, checked, decoded, cropped, to a batch in [-1, 1]",
    "shards": "the same from tar shards, by range and checksum",
    "workers": "the folder through one worker process, as training waits for it (wall time)",
    "latents": "posteriors of the latent set that --latents names, drawn anew",
}


def main(arguments: list[str]) -> int:
    """One JSON line for each way, then the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__)
    parser.add_argument("work", nargs="*", metavar="WORK", help=f"some of {', '.join(WORK)}")
    parser.add_argument("--count", type=positive, default=256, help="images (default 256)")
    parser.add_argument("--image-size", type=positive, default=256, help="pixels to crop to (default 256)")
    parser.add_argument("--batch", type=positive, default=32, help="images a batch (default 32)")
    parser.add_argument("--latents", type=Path, help="folder that `smalti encode` wrote")
    add_common_options(parser, precisions=["fp32"])
    options = parser.parse_args(arguments)
    wanted = options.work or [name for name in WORK if name != "latents" or options.latents]
    if unknown := [name for name in wanted if name not in WORK]:
        parser.error(f"no work {', '.join(unknown)}; there is {', '.join(WORK)}")
    if "latents" in wanted and not options.latents:
        raise ConfigError("latents need a set: --latents FOLDER, made by `smalti encode`")
    if options.threads != 1 or options.device != "cpu":
        parser.error("a worker has one thread and no GPU: leave --threads and --device out")
    device = prepare(options)
    recorder = Recorder("data", device, options.out)
    with tempfile.TemporaryDirectory(prefix="smalti-bench-") as place:
        ways = _ways(Path(place), options)
        seconds: dict[str, list[float]] = {name: [] for name in wanted}
        floor: list[float] = []
        for name in {"pillow", *wanted}:
            ways[name](1)  # first calls load libraries, and the disk's cache
        for _ in range(options.repeats):
            floor.append(ways["pillow"](options.count))
            for name in wanted:
                seconds[name].append(floor[-1] if name == "pillow" else ways[name](options.count))
    for name in wanted:
        median = statistics.median(seconds[name])
        ratio = statistics.median(own / plain for own, plain in zip(seconds[name], floor, strict=True))
        recorder.add(
            work=name,
            count=options.count,
            image_size=options.image_size,
            batch=options.batch,
            seconds=median,
            samples_per_second=options.count / median,
            of_pillow=1 / ratio,
            clock="wall time" if name == "workers" else "cpu time",
            repeats=options.repeats,
        )
    rows = [(r["work"], f"{r['samples_per_second']:.0f}", f"{r['of_pillow']:.2f}") for r in recorder.rows]
    sys.stdout.write("\n" + table(("way", "samples/s", "x pillow"), rows))
    return 0


def _ways(place: Path, options: argparse.Namespace) -> dict[str, Callable[[int], float]]:
    """Each brings so many images to batches, and returns the seconds that it took."""
    _write_photographs(place / "photos", options.count)
    with tarfile.open(place / "photos.tar", "w") as archive:
        archive.add(place / "photos", ".")
    size = (options.image_size, options.image_size)
    folder = load_folder(place / "photos", size, cache_bytes=0)
    shards = load_shards(place / "photos.tar", size, cache_bytes=0)
    order = SampleOrder(range(options.count), 0)

    def pillow(count: int) -> float:
        started = time.process_time()
        for i in range(count):
            image = Image.open(place / "photos" / folder.item_names[order.at(i)[1]]).convert("RGB")
            np.asarray(centre_crop(image, size))
        return time.process_time() - started

    def batches(image_set: object) -> Callable[[int], float]:
        def run(count: int) -> float:
            started = time.process_time()
            for first in range(0, count, options.batch):
                positions = range(first, min(first + options.batch, count))
                load_batch(image_set, order, positions, flip=False, seed=0)  # type: ignore[arg-type]
            return time.process_time() - started

        return run

    def workers(count: int) -> float:
        def load(step: int) -> torch.Tensor:
            first = max(0, step - 1) * options.batch
            positions = range(first, min(first + options.batch, count))
            return load_batch(folder, order, positions, flip=False, seed=0).images

        steps = -(-count // options.batch)
        with prefetched(load, 0, steps + 1, workers=1) as made:  # one more at the front, for the start
            next(made)
            started = time.perf_counter()
            for _ in made:
                pass
            return time.perf_counter() - started

    ways = {"pillow": pillow, "folder": batches(folder), "shards": batches(shards), "workers": workers}
    if options.latents:
        ways["latents"] = _latents(load_examples(options.latents), options)
    return ways


def _latents(examples: Examples, options: argparse.Namespace) -> Callable[[int], float]:
    order = SampleOrder(range(len(examples.catalogue)), 0)

    def run(count: int) -> float:
        started = time.process_time()
        for first in range(0, count, options.batch):
            examples.load(order, range(first, min(first + options.batch, count)), flip=False, seed=0)
        return time.process_time() - started

    return run


def _write_photographs(folder: Path, count: int) -> None:
    """JPEG files of about 100 KB, each another one."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(count):
        rows, columns = int(draw.integers(300, 401)), int(draw.integers(350, 501))
        field = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(field.resize((columns, rows), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + draw.normal(0, 14, (rows, columns, 1)).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        (folder / f"{i:06}.jpg").write_bytes(buffer.getvalue())
