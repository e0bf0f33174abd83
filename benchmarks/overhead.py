"""What training does beside forward and backward, as a share of the step, in one run and on warm memory.

Works: `data` (batches made by the training process, and ahead of it by workers: how long a step waits), `update`
(optimizer and average of the weights, beside a plain loop over the same bytes), `log` (one line a step), `checkpoint`
(how long training stands still for a save, by itself and beside the training). Networks: `demo` is the DiT of `smalti
demo`, any preset else is fitted to the same images.
"""

import argparse
import ctypes
import functools
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.checkpoints import CheckpointStore
from smalti.checkpoints.saver import AsyncSaver
from smalti.cost import clock_name, measure_interleaved
from smalti.errors import ConfigError
from smalti.ops.native import load_native
from smalti.training import RunConfig, TrainState, train_steps
from smalti.training.batches import BatchSource, TrainBatch
from smalti.training.fused_update import Updates, refuses
from smalti.training.log import RunLog
from smalti.training.prefetch import prefetched
from smalti.workflows.demo import recipe
from smalti.workflows.train_setup import Run, new_state, prepare_run

WORK = ("data", "update", "log", "checkpoint")
NETWORKS = ("demo", "dit-s-2")
BAR = 1.10  # of one pass over the bytes, for optimizer and average
BYTES = 36  # that a pass moves for each parameter
SAMPLE_SECONDS = 0.05  # of an update, which a small network needs a millisecond for
SAVES = 3  # timed ones: each writes 16 bytes for each parameter
SOURCE = Path(__file__).with_name("single_pass.c")

Precision = Literal["fp32", "bf16"]
Row = dict[str, Any]
Rows = Iterator[Row]


def main(arguments: list[str]) -> int:
    """One JSON line for each work and network, then the table; with --check 1 when a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Data and checkpoints are wall time, which other processes disturb: measure on an idle machine.",
    )
    parser.add_argument("work", nargs="*", metavar="WORK", default=WORK, help=f"some of {', '.join(WORK)}")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="demo, or a preset")
    parser.add_argument("--override", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. depth=2")
    parser.add_argument("--batch-size", type=positive, help="images a step (default: the demo's)")
    parser.add_argument("--workers", type=positive, default=1, help="processes that make batches ahead (default 1)")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.work if name not in WORK]:
        parser.error(f"no work {', '.join(unknown)}; there is {', '.join(WORK)}")
    if options.device != "cpu":
        parser.error("the plain loop over the bytes is for CPUs: leave --device out")
    recorder = Recorder("overhead", prepare(options), options.out)
    for network in options.networks:
        for precision in options.precision:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                for row in _measure(network, precision, Path(folder), options):
                    recorder.add(**row)
    sys.stdout.write("\n" + _table(recorder.rows))
    missed = [row for row in recorder.rows if "bar" in row and not row["floors"] <= row["bar"]]
    for row in missed:
        why = f": {row['refused']}" if row["refused"] else ""
        sys.stdout.write(f"{row['network']}: {row['work']} is {row['floors']:.2f} floors, above {row['bar']:g}{why}\n")
    return int(bool(missed) and options.check)


def _measure(network: str, precision: str, folder: Path, options: argparse.Namespace) -> Rows:
    config = replace(recipe("dit", folder, 0), steps=10**6, precision=cast(Precision, precision), device="cpu")
    config = replace(config, override=(*config.override, *options.override))
    if network != "demo":
        config = replace(config, model=network)
    if options.batch_size:
        config = replace(config, batch_size=options.batch_size)
    run, model = prepare_run(config)
    state = new_state(run, model)
    source = _TimedSource(run.batches, config)
    steps = train_steps(state, source, config)
    head = {
        "network": network,
        "override": options.override,
        "precision": precision,
        "batch": config.batch_size,
        "parameters": sum(p.numel() for p in state.model.parameters()),
    }
    works = {
        "data": lambda: _data(run, source, lambda: next(steps), options),
        "update": lambda: _update(state, lambda: next(steps), options),
        "log": lambda: _log(folder, lambda: next(steps), options),
        "checkpoint": lambda: _checkpoint(state, config, folder, lambda: next(steps), options),
    }
    for _ in range(2):  # the first step makes the moments
        next(steps)
    for name in options.work:
        for row in works[name]():
            yield head | row


class _TimedSource(BatchSource):
    """Batches of a run from wherever `load` takes them, and how long the loop waited for each."""

    batches: BatchSource
    batch_size: int
    load: Callable[[int], TrainBatch]
    waits: list[float]

    def __init__(self, batches: BatchSource, config: RunConfig) -> None:
        # The base is frozen.
        object.__setattr__(self, "batches", batches)
        object.__setattr__(self, "objective", batches.objective)
        object.__setattr__(self, "batch_size", config.batch_size)
        object.__setattr__(self, "waits", [])
        self.use(self.make)

    def use(self, load: Callable[[int], TrainBatch]) -> None:
        object.__setattr__(self, "load", load)

    def make(self, step: int) -> TrainBatch:
        return self.batches.at(step * self.batch_size, self.batch_size)

    def at(self, start: int, count: int) -> TrainBatch:
        if count != self.batch_size:
            raise ConfigError(f"{count} of {self.batch_size} images in a pass: shares are measured without micro_batch")
        begin = time.perf_counter()
        batch = self.load(start // self.batch_size)
        self.waits.append(time.perf_counter() - begin)
        return batch


def _data(run: Run, source: _TimedSource, step: Callable[[], object], options: argparse.Namespace) -> Rows:
    for workers in (0, options.workers):
        with prefetched(source.make, 0, options.repeats + 2, workers=workers) as ready:
            source.use(functools.partial(_next, ready))
            seconds = []
            for _ in range(options.repeats + 2):
                begin = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - begin)
        source.use(source.make)
        # The first batches were begun when they were wanted.
        waits, seconds = source.waits[-options.repeats :], seconds[2:]
        yield _row(
            "data ahead" if workers else "data", statistics.median(waits), statistics.median(seconds), workers=workers
        )


def _next(batches: Iterator[TrainBatch], step: int) -> TrainBatch:
    return next(batches)


def _update(state: TrainState, step: Callable[[], object], options: argparse.Namespace) -> Rows:
    trained = [p for p in state.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) * 1e-3 for p in trained]
    number, updates = state.step, Updates()

    def two_calls() -> None:
        state.optimizer.step()
        state.ema.update(state.model, number)

    times = measure_interleaved({"step": step}, repeats=options.repeats)
    for weight, gradient in zip(trained, gradients, strict=True):
        weight.grad = gradient
    functions = {
        "update": lambda: updates(state.optimizer, state.ema, state.model, number),
        "two calls": two_calls,
        "floor": _single_pass(state, gradients),
    }
    # Without steps between them, so that each finds in the caches what another of them left there.
    times |= measure_interleaved(functions, repeats=max(9, options.repeats), warmup=2, min_seconds=SAMPLE_SECONDS)
    refused = refuses(state.optimizer, state.ema, state.model)
    state.optimizer.zero_grad()
    floor, elements = times["floor"].median, sum(p.numel() for p in trained)
    yield _row(
        "update",
        times["update"].median,
        times["step"].median,
        clock=clock_name("cpu"),
        refused=refused,
        floor_seconds=floor,
        floor_gigabytes_per_second=BYTES * elements / floor / 1e9,
        floors=times["update"].median / floor,
        bar=BAR,
        two_calls_seconds=times["two calls"].median,
        two_calls_floors=times["two calls"].median / floor,
    )


def _single_pass(state: TrainState, gradients: list[torch.Tensor]) -> Callable[[], None]:
    """A plain loop over the arrays of the update.

    Raises:
        ConfigError: it cannot be compiled here.
    """
    native = load_native(SOURCE)
    if native.library is None:
        raise ConfigError(f"no yardstick for the update: {native.reason}")
    function = native.library.single_pass
    address = ctypes.c_void_p
    function.argtypes = [ctypes.c_int64, address, address, ctypes.c_float, ctypes.c_int]
    function.restype = None
    averages = dict(zip(state.model.parameters(), state.ema.model.parameters(), strict=True))
    trained = [p for p in state.model.parameters() if p.requires_grad]
    moments = [[state.optimizer.state[p][key] for p in trained] for key in ("exp_avg", "exp_avg_sq")]
    columns: list[list[torch.Tensor]] = [[*trained], gradients, *moments, [averages[p] for p in trained]]
    sizes = array("q", [p.numel() for p in trained])
    addresses = array("q", [x.data_ptr() for column in columns for x in column])

    def run(_: object = columns) -> None:  # which keeps the memory behind the addresses
        function(len(sizes), sizes.buffer_info()[0], addresses.buffer_info()[0], 0.0, torch.get_num_threads())

    return run


def _log(folder: Path, step: Callable[[], object], options: argparse.Namespace) -> Rows:
    with closing(RunLog(folder, -1, tensorboard=False)) as log:
        numbers = iter(range(10**9))

        def write() -> None:
            log.write("train", next(numbers), loss=0.123456789, grad_norm=1.23456789, learning_rate=1e-4, skipped=0)

        samples: dict[str, list[float]] = {"step": [], "line": []}
        rows: list[tuple[str, Callable[[], object], int]] = [("step", step, 1), ("line", write, 100)]
        for _ in range(options.repeats):
            for name, run, calls in rows:
                begin = time.perf_counter()
                for _ in range(calls):
                    run()
                samples[name].append((time.perf_counter() - begin) / calls)
    yield _row("log", statistics.median(samples["line"]), statistics.median(samples["step"]))


def _checkpoint(
    state: TrainState, config: RunConfig, folder: Path, step: Callable[[], object], options: argparse.Namespace
) -> Rows:
    """Each save once untimed: memory for copies is taken then, and kept."""
    store = CheckpointStore(folder / "checkpoints", keep_last=1)
    numbers = iter(range(10**9))
    steps, alone, blocking, total, beside = [], [], [], [], []
    for _ in range(options.repeats):
        begin = time.perf_counter()
        step()
        steps.append(time.perf_counter() - begin)
    for _ in range(1 + SAVES):
        begin = time.perf_counter()
        path = store.save(next(numbers), state.groups(), state.counters())
        alone.append(time.perf_counter() - begin)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with AsyncSaver(store) as saver:
        for _ in range(1 + SAVES):
            begin = time.perf_counter()
            saver.save(next(numbers), state.groups(), state.counters())
            blocking.append(time.perf_counter() - begin)
            during = []
            while saver.busy:
                begin = time.perf_counter()
                step()
                during.append(time.perf_counter() - begin)
            saver.wait()
            total.append(saver.seconds)
            beside += during
    usual = statistics.median(steps)
    every = config.checkpoint_every
    more: Row = {
        "total_seconds": statistics.median(total[1:]),
        "first_seconds": blocking[0],
        "step_seconds_meanwhile": statistics.median(beside) if beside else None,
    }
    for work, samples in (("save", alone), ("save beside", blocking)):
        seconds = statistics.median(samples[1:])
        shared: Row = {"bytes": size, "checkpoint_every": every, "steps_lost": seconds / usual}
        yield _row(work, seconds, usual * every, **shared, **(more if work == "save beside" else {}))


def _row(work: str, seconds: float, of: float, *, clock: str = "wall time", **more: Any) -> Row:
    """`share` of the time `of`: a step, or all steps from one checkpoint to the next."""
    return {"work": work, "seconds": seconds, "of_seconds": of, "share": seconds / of, "clock": clock, **more}


def _table(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        notes = {
            "update": "{floors:.2f} floors, two calls {two_calls_floors:.2f}",
            "data ahead": "{workers} workers",
            "save": "{bytes:,} bytes, {steps_lost:.2f} steps",
            "save beside": "{total_seconds:.2f} s in all, {steps_lost:.2f} steps",
        }.get(row["work"], "")
        cells.append(
            (
                row["network"],
                row["precision"],
                row["work"],
                f"{row['seconds'] * 1e3:.3f}",
                f"{row['share'] * 100:.3f}",
                notes.format(**row),
            )
        )
    return table(("network", "precision", "work", "ms", "% of the step", ""), cells) + (
        "Shares of saves are of all steps from one checkpoint to the next.\n"
    )
