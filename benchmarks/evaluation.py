"""Numbers on sets of images: moments and neighbour counts, beside the time of their matrix products, with peak memory.

Each kind of work runs in a process of its own, whose highest resident memory counts, features included. A floor is the
multiply-adds of all products, n D D for moments and (n n + m m + n m) D for neighbours, by the rate of a large product
of the same features in the same process, measured before and after. Symmetric products may be computed by half, so a
floor can be undercut. Works called `stream` go the whole way from images to numbers (`benchmarks.evaluation_stream`);
they have no floor, only a limit on memory.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluation_stream import STREAMS, measure_stream, peak_bytes
from benchmarks.record import ROOT, Recorder, add_common_options, positive, prepare, table
from smalti.errors import SmaltiError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import group_of_each
from smalti.evaluation.moments import Moments
from smalti.evaluation.precision_recall import density_coverage, precision_recall

WORK = {
    "moments": "mean and covariance of ours in one piece",
    "merged": "the same in three pieces, merged",
    "suite": "precision and recall as the ADM suite rounds them",
    "suite-intervals": "the same with uncertainty",
    "exact-intervals": "precision and recall in float64, with uncertainty",
    "density-intervals": "density and coverage, with uncertainty",
} | {name: f"images to {', '.join(metrics)}, all with uncertainty" for name, (metrics, _) in STREAMS.items()}
DEFAULT = [name for name in WORK if name not in ("exact-intervals", "stream-infinity")]
_GEMM_ROWS = 2048


def main(arguments: list[str]) -> int:
    """One JSON line for each kind of work, then the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluation", description=__doc__)
    parser.add_argument("work", nargs="*", metavar="WORK", default=DEFAULT, help=f"some of {', '.join(WORK)}")
    parser.add_argument("--count", type=positive, default=50_000, help="our images (default 50000)")
    parser.add_argument("--reference-count", type=positive, default=10_000, help="real images (default 10000)")
    parser.add_argument("--width", type=positive, default=2048, help="numbers an image (default 2048)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_common_options(parser, precisions=["fp32"])
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.work if name not in WORK]:
        parser.error(f"no work {', '.join(unknown)}; there is {', '.join(WORK)}")
    if options.device != "cpu":
        parser.error("statistics and neighbours are computed on the CPU: leave --device out")
    device = prepare(options)
    if options.child:
        name = options.work[0]
        found = measure_stream(name, options) if name in STREAMS else _measure(name, options)
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    recorder = Recorder("evaluation", device, options.out)
    for name in options.work:
        recorder.add(**_in_a_child(name, options))
    rows = [
        (
            row["work"],
            f"{row['count']:,}",
            f"{row['reference_count']:,}",
            f"{row['seconds']:.2f}",
            f"{row['floors']:.2f}" if "floors" in row else "-",
            f"{row['peak_bytes'] / 2**30:.2f}",
        )
        for row in recorder.rows
    ]
    sys.stdout.write("\n" + table(("work", "ours", "real", "seconds", "x floor", "peak GiB"), rows))
    return _judged(recorder.rows)


def _judged(rows: list[dict[str, Any]]) -> int:
    """The phases of streams, and 1 where one took more memory than its limit."""
    code = 0
    for row in rows:
        if "phases" not in row:
            continue
        phases = [(p, f"{v['seconds']:.2f}", f"{v['peak_bytes'] / 2**30:.2f}") for p, v in row["phases"].items()]
        sys.stdout.write(f"\n{table((row['work'], 'seconds', 'peak GiB'), phases)}")
        if row["peak_bytes"] > row["limit_bytes"]:
            sys.stdout.write(f"{row['work']}: above the limit of {row['limit_bytes'] / 2**30:g} GiB\n")
            code = 1
    return code


def _in_a_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    flags = {
        "--count": options.count,
        "--reference-count": options.reference_count,
        "--width": options.width,
        "--threads": options.threads,
        "--repeats": options.repeats,
    }
    command = [sys.executable, "-m", "benchmarks", "evaluation", name, "--child"]
    command += [str(part) for flag in flags.items() for part in flag]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SmaltiError(f"{name} ended with exit code {done.returncode}; -9 means that memory ran out")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    n, m, width = options.count, options.reference_count, options.width
    clock = time.process_time if options.threads == 1 else time.perf_counter
    moments = name in ("moments", "merged")
    ours, real = features(n, width, seed=1, spread=0.9), features(0 if moments else m, width, seed=2)
    run, macs, dtype = _prepared(name, ours, real)
    run_small, _, _ = _prepared(name, ours[:64], real[:64])
    run_small()  # first calls load libraries
    rates = [_gemm_rate(ours, dtype, clock) for _ in range(options.repeats)]
    started = clock()
    found = run()
    seconds = clock() - started
    rates += [_gemm_rate(ours, dtype, clock) for _ in range(options.repeats)]
    rate = max(rates)
    return {
        "work": name,
        "count": n,
        "reference_count": len(real),
        "width": width,
        "seconds": seconds,
        "floors": seconds * rate / macs,
        "gmacs": macs / 1e9,
        "gemm_gmacs_per_second": rate / 1e9,
        "gemm_dtype": str(dtype).removeprefix("torch."),
        "peak_bytes": peak_bytes(),
        "feature_bytes": (ours.nelement() + real.nelement()) * 4,
        "clock": "cpu time" if options.threads == 1 else "wall time",
        "values": found,
    }


def _prepared(name: str, ours: Tensor, real: Tensor) -> tuple[Callable[[], dict[str, float]], int, torch.dtype]:
    """The work, its multiply-adds, and the precision of its products."""
    (n, width), m = ours.shape, len(real)
    if name == "moments":
        return lambda: {"trace": Moments.of(ours).covariance.trace().item()}, n * width**2, torch.float64
    if name == "merged":
        return lambda: _merged(ours), n * width**2, torch.float64
    groups = group_of_each(n) if name.endswith("-intervals") else None
    a, b = FeatureSet({"pool": ours}), FeatureSet({"pool": real})
    if name == "density-intervals":  # nothing of ours has a radius
        return lambda: _values(density_coverage(a, b, groups)), (m * m + n * m) * width, torch.float64
    rule, _, _ = name.partition("-")
    dtype = torch.float32 if rule == "suite" else torch.float64
    return lambda: _values(precision_recall(a, b, groups, rule=rule)), (n * n + m * m + n * m) * width, dtype


def _merged(ours: Tensor) -> dict[str, float]:
    return {"trace": Moments.merged(Moments.of(part) for part in ours.tensor_split(3)).covariance.trace().item()}


def _values(found: Any) -> dict[str, float]:
    return {name: values.value for name, values in found.items()}


def features(count: int, width: int, *, seed: int, spread: float = 1.0) -> Tensor:
    """Features as networks make them: not negative, of squared length about 400, and of few true dimensions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(24, width, generator=generator) * (0.8 * (2048 / width) ** 0.5 / 24**0.5)
    generator.manual_seed(seed)
    rows = torch.empty(count, width)
    for part in rows.split(4096):
        latents = torch.randn(len(part), 24, generator=generator) * spread
        torch.mm(latents, directions, out=part)
        part.relu_()
    return rows


def _gemm_rate(rows: Tensor, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Multiply-adds per second of a large product of features."""
    u = rows[:_GEMM_ROWS].to(dtype)
    started = clock()
    torch.mm(u, u.T)
    return len(u) ** 2 * rows.shape[1] / (clock() - started)
