"""Twin in C for CPUs (adamw_ema.c), compiled at its first use; without a compiler two plain calls take its place."""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from smalti.ops.adamw_ema.reference import Operands, Rates, layout_refusal
from smalti.ops.adamw_ema.table import Table
from smalti.ops.native import load_native

SOURCE = Path(__file__).with_name("adamw_ema.c")


def c_refusal(operands: Operands) -> str:
    """Why C cannot take these tensors; "" = it can."""
    if torch.compiler.is_compiling():
        return "a compiler cannot see what it changes"
    if (device := operands.weights[0].device).type != "cpu":
        return f"it is for CPUs and CUDA, got {device.type}"
    return layout_refusal(operands) or unavailable()


def adamw_ema_c(table: Table, rates: Rates) -> None:
    """One step of all tensors, cut into pieces for `torch.get_num_threads()` threads; the same bits with any number.

    The bits are also those of `torch.optim.AdamW(fused=True)` and `torch.lerp`, where PyTorch uses AVX2.
    """
    table.mark_changed()
    failed = _library().adamw_ema(
        table.count, table.sizes.buffer_info()[0], table.places.buffer_info()[0], rates.learning_rate, *rates.betas,
        rates.epsilon, rates.weight_decay, rates.average, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"the optimizer step found no memory for a table of {table.count} tensors")


@cache
def unavailable() -> str:
    """Why there is no library on this machine; "" when there is one. Compiles it when asked for the first time."""
    reason = load_native(SOURCE).reason
    if reason:
        logging.getLogger("smalti").warning(
            "AdamW and the average of the weights take two passes instead of one, up to 1.5 times slower: %s", reason
        )
    return reason


@cache
def _library() -> ctypes.CDLL:
    library = load_native(SOURCE).library
    if library is None:
        raise RuntimeError(f"adamw_ema_c was called where it refuses to run: {unavailable()}")
    size, address, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    library.adamw_ema.argtypes = [size, address, address, *[number] * 6, ctypes.c_int]
    library.adamw_ema.restype = ctypes.c_int
    return library
