"""Every backbone in one run: forward and training step as multiples of the machine's own floor, peak memory.

A floor is the multiply-adds of the work divided by the rate of a large matrix product, measured in turns with it. The
forward counts once and runs the inference form; a training step (forward, backward, optimizer, average of the weights)
counts three times.
"""

import argparse
import sys
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.cost import clock_name, count_macs, count_parameters, peak_memory_refusal
from smalti.models import BackboneConfig
from smalti.presets import parse_overrides, preset_config
from smalti.workflows.timed import refusal, time_work

SMALL = ("dit-s-2", "udit-s", "drwkv-s-2", "diffussm-s")
PRECISIONS = ("fp32", "bf16", "bf16-weights")
MODES = ("eager", "compiled", "frozen")


def main(arguments: list[str]) -> int:
    """One JSON line per preset, mode, precision and batch, then the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Training needs about 20 bytes of memory per parameter beside the activations. Compiling takes up to "
        "minutes for each network, mode, precision and batch.",
    )
    parser.add_argument("presets", nargs="*", metavar="PRESET", default=SMALL, help=f"default {' '.join(SMALL)}")
    parser.add_argument("--override", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. depth=2 sample_size=64")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 8], help="images at once (default 1 8)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["eager"], help="frozen: inference only")
    parser.add_argument("--only", choices=("forward", "training"), help="leave the other out")
    parser.add_argument("--count", action="store_true", help="count only, time nothing")
    add_common_options(parser, precisions=PRECISIONS)
    options = parser.parse_args(arguments)
    overrides = parse_overrides(tuple(options.override))
    configs = {name: preset_config(name, **overrides) for name in options.presets}
    device = prepare(options)
    recorder = Recorder("model", device, options.out)
    work = ("forward", "training") if options.only is None else (options.only,)
    for name, config in configs.items():
        head = {"preset": name, "override": options.override, **_counts(config)}
        if options.count:
            recorder.add(**head)
            continue
        for mode in options.mode:
            for precision in options.precision:
                for batch in options.batch:
                    # A step is timed at the largest batch only: nobody trains on one image.
                    wanted = [w for w in work if w == "forward" or batch == max(options.batch)]
                    if wanted := [w for w in wanted if not refusal(precision, mode, w)]:
                        measured = _measure(config, batch, precision, mode, device, wanted, options.repeats)
                        recorder.add(**head, **measured)
    if recorder.rows:
        sys.stdout.write("\n" + _table(recorder.rows, work))
    else:
        sys.stdout.write(f"nothing to time: {refusal(options.precision[0], options.mode[0], work[0])}\n")
    return 0


def _counts(config: BackboneConfig) -> dict[str, Any]:
    macs, parameters = count_macs(config, fused=True), count_parameters(config)
    return {
        "parameters": parameters.total,
        "trained_parameters": parameters.trained,
        "fused_parameters": parameters.fused,
        "gmacs": macs.total / 1e9,
        "gmacs_by_part": {part: count / 1e9 for part, count in macs.by_part.items()},
        "gmacs_by_kind": {kind: count / 1e9 for kind, count in macs.by_kind.items()},
        "parameters_by_part": parameters.by_part,
    }


def _measure(
    config: BackboneConfig, batch: int, precision: str, mode: str, device: torch.device, work: list[str], repeats: int
) -> dict[str, Any]:
    """Times, floors and memory of one preset in one mode and precision."""
    result: dict[str, Any] = {"batch": batch, "precision": precision, "mode": mode}
    result |= {"clock": clock_name(device), "repeats": repeats, "memory_refusal": peak_memory_refusal(device)}
    for what in work:
        time = time_work(config, what, batch=batch, precision=precision, device=device, mode=mode, repeats=repeats)
        result |= {f"{what}_{key}": value for key, value in asdict(time).items()}
    return result


def _table(rows: list[dict[str, Any]], work: tuple[str, ...]) -> str:
    header = ["preset", "parameters", "GMACs"]
    lines = [[row["preset"], f"{row['parameters']:,}", f"{row['gmacs']:.3f}"] for row in rows]
    if "batch" not in rows[0]:
        return table(header, lines)
    header += ["batch", "precision", "mode"]
    for what in work:
        header += [f"{what} ms", "x floor", "x fp32 floor", "peak MiB"]
    for row, line in zip(rows, lines, strict=True):
        line += [row["batch"], row["precision"], row["mode"]]
        for what in work:
            line += _cells(row, what)
    notes = ["x floor: against the matrix rate of the same precision. peak: what the work adds to what was held."]
    notes += sorted({row["memory_refusal"] for row in rows if row["memory_refusal"]})
    return table(header, lines) + "\n".join(notes) + "\n"


def _cells(row: dict[str, Any], what: str) -> list[str]:
    if f"{what}_seconds" not in row:
        return ["-"] * 4
    peak = row[f"{what}_peak_added_bytes"]
    return [
        f"{row[f'{what}_seconds'] * 1e3:.1f}",
        f"{row[f'{what}_floors']:.2f}",
        f"{row[f'{what}_fp32_floors']:.2f}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
    ]
