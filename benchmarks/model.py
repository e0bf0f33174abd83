"""Any preset: parameters, GMACs, forward and training step as multiples of the machine's own floor, peak memory.

A floor is the multiply-adds of the work divided by the rate of a large matrix product, measured in turns with it. The
forward counts once, a training step (forward, backward, optimizer, average of the weights) three times.
"""

import argparse
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import DTYPES, Recorder, add_common_options, positive, prepare, table
from smalti import streams
from smalti.cost import (
    Gemm,
    clock_name,
    count_macs,
    count_parameters,
    measure_interleaved,
    peak_memory,
    peak_memory_refusal,
)
from smalti.diffusion import LevelBatch, ObjectiveConfig, build_schedule
from smalti.models import BackboneConfig, build_backbone
from smalti.presets import parse_overrides, preset_config
from smalti.training import EMA, RunConfig, TrainState, train_steps
from smalti.training.batches import BatchSource, TrainBatch
from smalti.training.loop import autocast
from smalti.training.optim import build_optimizer

TRAINING_FORWARDS = 3  # the backward pass has two products for each one of the forward


def main(arguments: list[str]) -> int:
    """One JSON line per preset and precision, then the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Training needs about 20 bytes of memory per parameter beside the activations.",
    )
    parser.add_argument("presets", nargs="+", metavar="PRESET", help="as `smalti presets` lists them, e.g. dit-s-2")
    parser.add_argument("--override", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. depth=2 sample_size=64")
    parser.add_argument("--batch", nargs="+", type=positive, default=[8], help="images at once (default 8)")
    parser.add_argument("--only", choices=("forward", "training"), help="leave the other out")
    parser.add_argument("--count", action="store_true", help="count only, time nothing")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    overrides = parse_overrides(tuple(options.override))
    configs = {name: preset_config(name, **overrides) for name in options.presets}
    device = prepare(options)
    recorder = Recorder("model", device, options.out)
    work = ("forward", "training") if options.only is None else (options.only,)
    for name, config in configs.items():
        if options.count:
            recorder.add(preset=name, override=options.override, **_counts(config))
            continue
        for batch in options.batch:
            for precision in options.precision:
                measured = _measure(config, batch, precision, device, work, options.repeats)
                recorder.add(preset=name, override=options.override, **_counts(config), **measured)
    sys.stdout.write("\n" + _table(recorder.rows, work))
    return 0


def _counts(config: BackboneConfig) -> dict[str, Any]:
    macs, parameters = count_macs(config, fused=True), count_parameters(config)
    return {
        "parameters": parameters.total,
        "trained_parameters": parameters.trained,
        "gmacs": macs.total / 1e9,
        "gmacs_by_part": {part: count / 1e9 for part, count in macs.by_part.items()},
        "parameters_by_part": parameters.by_part,
    }


def _measure(
    config: BackboneConfig, batch: int, precision: str, device: torch.device, work: tuple[str, ...], repeats: int
) -> dict[str, Any]:
    """Times, floors and memory of one preset in one precision."""
    subject = Subject(config, batch, precision, device)
    runs = {"forward": subject.forward, "training": subject.training_step}
    gemms = {f"gemm {name}": Gemm(dtype, device) for name, dtype in DTYPES.items() if name in ("fp32", precision)}
    result: dict[str, Any] = {"batch": batch, "precision": precision, "clock": clock_name(device), "repeats": repeats}
    macs = count_macs(config).total * batch
    for what in work:
        # Each with the yardstick beside it, so that a machine that slows down slows both.
        times = measure_interleaved({what: runs[what], **gemms}, device=device, repeats=repeats, warmup=2)
        seconds = times[what].median
        result |= {f"{what}_seconds": seconds, f"{what}_fastest": times[what].fastest}
        for name, gemm in gemms.items():
            rate = gemm.macs / times[name].median
            floor = macs * (TRAINING_FORWARDS if what == "training" else 1) / rate
            kind = name.removeprefix("gemm ")
            result |= {f"{what}_{kind}_floors": seconds / floor, f"{what}_{kind}_gemm_gmacs_per_second": rate / 1e9}
        if not peak_memory_refusal(device):
            memory = peak_memory(runs[what], device)
            result |= {f"{what}_peak_added_bytes": memory.added, f"{what}_peak_bytes": memory.peak}
    result["memory_refusal"] = peak_memory_refusal(device)
    return result


class FixedBatches(BatchSource):
    """Always the same batch, so that only the step itself is timed."""

    def __init__(self, batch: TrainBatch) -> None:
        object.__setattr__(self, "_batch", batch)  # the base is frozen
        object.__setattr__(self, "objective", ObjectiveConfig())

    def at(self, start: int, count: int) -> TrainBatch:
        return self._batch


class Subject:
    """A network with inputs, ready to run forward and to train."""

    def __init__(self, config: BackboneConfig, batch: int, precision: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self._model = build_backbone(config).to(device)
        _move_from_zero(self._model)
        normal = partial(torch.randn, generator=streams.generator(0, streams.NOISE))
        self._latents = normal(batch, config.in_channels, *config.sample_size)
        labels = torch.arange(batch) % config.num_classes if config.num_classes else None
        schedule = build_schedule("linear")
        levels: LevelBatch = schedule.at((torch.arange(batch) + 0.5) / batch)
        self._inputs = tuple(
            None if t is None else t.to(device) for t in (self._latents, levels.timesteps.float(), labels)
        )
        eps = normal(self._latents.shape)
        self._batches = FixedBatches(TrainBatch(self._latents, labels, eps, levels))
        self._precision, self._batch, self._device = precision, batch, device
        self._steps: Any = None

    def forward(self) -> Tensor:
        """As in sampling."""
        self._model.eval()
        with torch.no_grad(), autocast(self._device, self._precision):
            return self._model(*self._inputs)

    def training_step(self) -> object:
        """One turn of the loop that `smalti train` runs, without reading images."""
        if self._steps is None:
            run = RunConfig(steps=10**9, batch_size=self._batch, precision=self._precision)
            state = TrainState(self._model, EMA(self._model, 0.999), build_optimizer(self._model, run.optimizer))
            self._steps = train_steps(state, self._batches, run)
        self._model.train()
        return next(self._steps)


@torch.no_grad()
def _move_from_zero(model: nn.Module) -> None:
    """Networks start by saying zero; zeros must not make the timed products cheaper."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.02)


def _table(rows: list[dict[str, Any]], work: tuple[str, ...]) -> str:
    header = ["preset", "parameters", "GMACs"]
    lines = [[row["preset"], f"{row['parameters']:,}", f"{row['gmacs']:.3f}"] for row in rows]
    if "batch" not in rows[0]:
        return table(header, lines)
    header += ["batch", "precision"]
    for what in work:
        header += [f"{what} ms", "x floor", "x fp32 floor", "peak MiB"]
    for row, line in zip(rows, lines, strict=True):
        line += [row["batch"], row["precision"]]
        for what in work:
            peak = row.get(f"{what}_peak_added_bytes")
            line += [
                f"{row[f'{what}_seconds'] * 1e3:.1f}",
                f"{row[what + '_' + row['precision'] + '_floors']:.2f}",
                f"{row[f'{what}_fp32_floors']:.2f}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
            ]
    notes = ["x floor: against the matrix rate of the same precision. peak: what the work adds to what was held."]
    notes += sorted({row["memory_refusal"] for row in rows if row["memory_refusal"]})
    return table(header, lines) + "\n".join(notes) + "\n"
