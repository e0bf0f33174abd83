"""Every op of `smalti.ops.OPS`: reference and twins, checked against float64, then timed in turns."""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.record import DTYPES, Recorder, add_common_options, positive, prepare, table
from smalti.cost import clock_name, disagreement, measure_interleaved
from smalti.ops import OPS, Op

# Sizes as in DiT-S, beside the number of tokens; an op without a row is timed on its own example.
SHAPES = {"attention": {"batch": 1, "heads": 6, "head_size": 64}}


def main(arguments: list[str]) -> int:
    """Returns 1 when a twin disagrees with its reference; such a twin is not timed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(OPS), help=f"ops (default all: {', '.join(OPS)})")
    parser.add_argument("--tokens", nargs="+", type=positive, default=[64, 256, 1024], help="sequence lengths")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in OPS]:
        parser.error(f"no op {unknown[0]!r}; choose from {', '.join(OPS)}")
    device = prepare(options)
    recorder = Recorder("ops", device, options.out)
    for name in options.names:
        for precision in options.precision:
            for tokens in options.tokens:
                for gradients in (False, True):
                    _one(recorder, OPS[name], precision, tokens, gradients, device, options.repeats)
    sys.stdout.write("\n" + _table(recorder))
    return 1 if any(row["check"] != "green" for row in recorder.rows) else 0


def _one(
    recorder: Recorder, op: Op, precision: str, tokens: int, gradients: bool, device: torch.device, repeats: int
) -> None:
    example = op.example(tokens, DTYPES[precision], seed=0, **SHAPES.get(op.name, {}))
    args = tuple(a.detach().to(device).requires_grad_(gradients and a.is_floating_point()) for a in example)
    with torch.set_grad_enabled(gradients):
        refusals = {impl: op.refuses(impl, args) for impl in op.fast}
    able = ["reference", *(impl for impl, reason in refusals.items() if not reason)]
    checks = {impl: disagreement(op, impl, args, gradients=gradients) for impl in able}
    green = {impl: _runner(op, impl, args, gradients) for impl in able if not checks[impl]}
    timings = measure_interleaved(green, device=device, repeats=repeats, warmup=2, min_seconds=0.01)
    chosen = able[1] if len(able) > 1 else "reference"
    for impl in able:
        timing, reference = timings.get(impl), timings.get("reference")
        recorder.add(
            op=op.name,
            impl=impl,
            precision=precision,
            tokens=tokens,
            direction="forward and backward" if gradients else "forward",
            shapes=[list(a.shape) for a in args],
            check=checks[impl] or "green",
            chosen=impl == chosen,
            seconds=timing and timing.median,
            fastest=timing and timing.fastest,
            slowest=timing and timing.slowest,
            times_reference=timing and reference and reference.median / timing.median,
            clock=clock_name(device),
            refused={impl: reason for impl, reason in refusals.items() if reason},
        )


def _runner(op: Op, impl: str, args: tuple[Tensor, ...], gradients: bool) -> Callable[[], object]:
    if not gradients:

        def forward() -> Tensor:
            with torch.no_grad():
                return op(*args, impl=impl)

        return forward
    sources = [a for a in args if a.requires_grad]
    upstream = torch.ones_like(op(*args, impl=impl))
    return lambda: torch.autograd.grad(op(*args, impl=impl), sources, upstream)


def _table(recorder: Recorder) -> str:
    header = ("op", "precision", "direction", "tokens", "implementation", "ms", "x reference", "check")
    rows = [
        (
            row["op"],
            row["precision"],
            row["direction"],
            row["tokens"],
            row["impl"] + (" *" if row["chosen"] else ""),
            "-" if row["seconds"] is None else f"{row['seconds'] * 1e3:.3f}",
            "-" if row["times_reference"] is None else f"{row['times_reference']:.2f}",
            row["check"],
        )
        for row in recorder.rows
    ]
    return table(header, rows) + "* chosen by itself for these inputs\n"
