"""Seconds, and the yardstick for them: how fast this machine multiplies large matrices.

A time in milliseconds says little about code on another machine. Multiply-adds divided by the machine's own rate in the
same run are its *floor*; "1.3 floors" means the same everywhere.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Large enough that packing and launching do not count, small enough for a fraction of a second.
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `repeats` samples, each the mean of `calls` calls in a row."""

    median: float
    fastest: float
    slowest: float
    repeats: int
    calls: int


@dataclass(frozen=True)
class Gemm:
    """One square matrix product, to be timed beside what it is the yardstick for.

    Args:
        size: rows and columns; None = 2048 on a CPU, 8192 on CUDA, 4096 elsewhere.

    Raises:
        ValueError: a dtype that is not floating point, or a size below 1.
    """

    dtype: torch.dtype
    device: torch.device
    size: int = 0
    _operands: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        size = self.size or GEMM_SIZE.get(self.device.type, 4096)
        if not self.dtype.is_floating_point or size < 1:
            raise ValueError(
                f"a matrix product of {self.dtype}, size {size}: needs a floating dtype and size 1 or more"
            )
        object.__setattr__(self, "size", size)
        # Random, not zero: GPUs draw less power on zeros and clock higher.
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(size, size, generator=generator).to(self.device, self.dtype) for _ in range(2))
        object.__setattr__(self, "_operands", (left, right))

    @property
    def macs(self) -> int:
        return self.size**3

    def __call__(self) -> Tensor:
        left, right = self._operands
        return left @ right.mT  # as a linear layer multiplies


def gemm_rate(dtype: torch.dtype, device: torch.device | str, *, size: int = 0, repeats: int = 5) -> float:
    """Multiply-adds per second of a large matrix product, as measured now.

    Float32 follows torch's own setting (`torch.set_float32_matmul_precision`), so that a rate and the network beside
    it use the same arithmetic.
    """
    gemm = Gemm(dtype, torch.device(device), size)
    return gemm.macs / measure(gemm, device=gemm.device, repeats=repeats).median


def clock_name(device: torch.device | str) -> str:
    """Which clock `measure` reads: CUDA events, CPU time (one thread: blind to other processes) or wall time."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "cuda events"
    return "cpu time" if kind == "cpu" and torch.get_num_threads() == 1 else "wall time"


def measure(
    run: Callable[[], object],
    *,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    warmup: int = 1,
    min_seconds: float = 0.0,
) -> Timing:
    """Time one function; see `measure_interleaved`."""
    return measure_interleaved({"": run}, device=device, repeats=repeats, warmup=warmup, min_seconds=min_seconds)[""]


def measure_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    warmup: int = 1,
    min_seconds: float = 0.0,
) -> dict[str, Timing]:
    """Time several functions in turns, so that a machine that slows down slows all of them and ratios hold.

    Args:
        device: where the work happens; see `clock_name`.
        warmup: untimed calls of each function first.
        min_seconds: a sample repeats its function until it lasts about this long, for functions of microseconds.

    Raises:
        ValueError: repeats below 1 or warmup below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats {repeats} must be at least 1 and warmup {warmup} at least 0")
    clock = _clock(torch.device(device))
    calls = {}
    for name, run in functions.items():
        for _ in range(warmup):
            run()
        calls[name] = 1
        if min_seconds > 0:
            calls[name] = max(1, math.ceil(min_seconds / max(clock(run, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, run in functions.items():
            samples[name].append(clock(run, calls[name]) / calls[name])
    return {
        name: Timing(statistics.median(times), min(times), max(times), repeats, calls[name])
        for name, times in samples.items()
    }


def _clock(device: torch.device) -> Callable[[Callable[[], object], int], float]:
    """A function `(run, calls) -> seconds of all calls`."""
    if device.type == "cuda":
        return lambda run, calls: _cuda_seconds(run, calls, device)
    now = time.process_time if clock_name(device) == "cpu time" else time.perf_counter

    def seconds(run: Callable[[], object], calls: int) -> float:
        _wait(device)
        start = now()
        for _ in range(calls):
            run()
        _wait(device)
        return now() - start

    return seconds


def _cuda_seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
