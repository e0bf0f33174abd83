"""Peak memory of a piece of work: of the whole process on a Linux CPU, of all tensors on CUDA."""

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.errors import ConfigError

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class PeakMemory:
    """Bytes held before the work and at its highest point. On a CPU that is resident memory, libraries included."""

    before: int
    peak: int

    @property
    def added(self) -> int:
        """What the work itself needed."""
        return self.peak - self.before


def peak_memory_refusal(device: torch.device | str) -> str:
    """ "" where `peak_memory` can measure, else the reason why not."""
    kind = torch.device(device).type
    if kind == "cuda":
        return ""
    if kind != "cpu":
        return f"peak memory of {kind} has no counter that can be reset"
    if sys.platform != "linux":
        return f"peak memory of a process is read from Linux's /proc, this is {sys.platform}"
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return "peak memory needs glibc's malloc_trim, and this C library has none"
    try:
        _reset_peak()
    except OSError as error:
        return f"peak memory cannot be reset here: {_CLEAR_REFS}: {error.strerror}"
    return ""


def peak_memory(run: Callable[[], object], device: torch.device | str) -> PeakMemory:
    """Memory that one call of `run` needs. Call `run` once before: first calls also load and compile kernels.

    Raises:
        ConfigError: this machine has no way to tell; `peak_memory_refusal` says why.
    """
    device = torch.device(device)
    if reason := peak_memory_refusal(device):
        raise ConfigError(reason)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return PeakMemory(before, torch.cuda.max_memory_allocated(device))
    # Without this, pages that malloc kept from earlier work hide what the next one needs.
    ctypes.CDLL(None).malloc_trim(0)
    _reset_peak()
    before = _status_bytes("VmRSS")
    run()
    return PeakMemory(before, max(before, _status_bytes("VmHWM")))


def _reset_peak() -> None:
    _CLEAR_REFS.write_text("5")  # 5: reset the high-water mark; man 5 proc


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"{_STATUS} has no line {name}: peak memory cannot be read on this kernel")
