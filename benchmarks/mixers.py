"""Every mixer alone against scaled_dot_product_attention on as many tokens, forward, measured in turns.

Each mixer is timed twice: whole, and without its linear layers, which then answer from memory. `sdpa` is the bare fused
kernel, so it compares with the second.
"""

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import Recorder, add_common_options, positive, prepare, table
from smalti.config import did_you_mean
from smalti.cost import Gemm, clock_name, measure_interleaved
from smalti.errors import ConfigError
from smalti.nn.layers import Grid
from smalti.nn.mixers import MIXERS, build_mixer
from smalti.presets import preset_config
from smalti.presets.swap import HEAD_SIZE, swap_mixer
from smalti.workflows.timed import matrix_dtype

BARE = " without linear layers"


def main(arguments: list[str]) -> int:
    """One JSON line per mixer, precision and number of tokens, then the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks mixers", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(MIXERS), help=f"mixers (default {' '.join(MIXERS)})")
    parser.add_argument("--tokens", nargs="+", type=positive, default=[256, 1024, 4096, 16384], help="square numbers")
    parser.add_argument("--hidden-size", type=positive, default=384, help=f"a multiple of {HEAD_SIZE} (default 384)")
    parser.add_argument("--batch", type=positive, default=1, help="images at once (default 1)")
    add_common_options(parser)
    options = parser.parse_args(arguments)
    for kind in options.kinds:
        if kind not in MIXERS:
            raise ConfigError(f"no mixer {kind!r}{did_you_mean(kind, MIXERS)}")
    for tokens in options.tokens:
        if isqrt(tokens) ** 2 != tokens or isqrt(tokens) % 2:
            raise ConfigError(f"tokens {tokens}: expected the square of an even number, as a plane of them")
    if options.hidden_size % HEAD_SIZE:
        raise ConfigError(f"hidden-size {options.hidden_size}: expected a multiple of the head size {HEAD_SIZE}")
    device = prepare(options)
    recorder = Recorder("mixers", device, options.out)
    for precision in options.precision:
        for tokens in options.tokens:
            _measure(recorder, options, tokens, precision, device)
    sys.stdout.write("\n" + _table(recorder))
    return 0


def _measure(
    recorder: Recorder, options: argparse.Namespace, tokens: int, precision: str, device: torch.device
) -> None:
    dtype, width = matrix_dtype(precision), options.hidden_size
    torch.manual_seed(0)
    grid = Grid(isqrt(tokens), isqrt(tokens))
    x = torch.randn(options.batch, tokens, width).to(device, dtype)
    base = preset_config("dit-s-2", hidden_size=width, num_heads=width // HEAD_SIZE)
    runs: dict[str, Callable[[], object]] = {"sdpa": _sdpa(options.batch, tokens, width, dtype, device)}
    for kind in options.kinds:
        mixer = build_mixer(swap_mixer(base, kind).mixer, width).to(device, dtype)
        runs[kind] = partial(_forward, mixer, x, grid)
        runs[f"{kind}{BARE}"] = partial(_forward, without_linear_layers(mixer), x, grid)
    gemm = Gemm(dtype, device)
    times = measure_interleaved({**runs, "gemm": gemm}, device=device, repeats=options.repeats, min_seconds=0.005)
    for name in runs:
        recorder.add(
            mixer=name.removesuffix(BARE),
            linear_layers=name != "sdpa" and not name.endswith(BARE),
            tokens=tokens,
            precision=precision,
            hidden_size=width,
            batch=options.batch,
            seconds=times[name].median,
            fastest=times[name].fastest,
            times_sdpa=times["sdpa"].median / times[name].median,
            gemm_gmacs_per_second=gemm.macs / times["gemm"].median / 1e9,
            clock=clock_name(device),
        )


class _FromMemory(nn.Module):
    """Stands for a linear layer: gives a fixed result of the right shape, made at the first call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._layer, self._result = [layer], None  # in a list, so that it is no module of this one

    def forward(self, x: Tensor) -> Tensor:
        if self._result is None:
            self._result = self._layer[0](x)
        return self._result


def without_linear_layers(mixer: nn.Module) -> nn.Module:
    """A copy of the mixer in which linear layers cost nothing; it gives the same result for always the same input."""
    bare = deepcopy(mixer)
    for module in list(bare.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _FromMemory(child))
    return bare


@torch.no_grad()
def _forward(mixer: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    return mixer(x, grid)


def _sdpa(batch: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    q, k, v = torch.randn(3, batch, width // HEAD_SIZE, tokens, HEAD_SIZE).to(device, dtype)
    return lambda: F.scaled_dot_product_attention(q, k, v)


def _table(recorder: Recorder) -> str:
    header = ("mixer", "linear layers", "precision", "tokens", "ms", "times faster than sdpa")
    rows = [
        (
            r["mixer"],
            "with" if r["linear_layers"] else "without",
            r["precision"],
            r["tokens"],
            f"{r['seconds'] * 1e3:.3f}",
            f"{r['times_sdpa']:.2f}",
        )
        for r in recorder.rows
    ]
    return table(header, rows)
