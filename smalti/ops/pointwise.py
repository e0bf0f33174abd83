"""What the C twins of pointwise.c share: the library, who may call it, and modulations as C reads them."""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from smalti.ops.in_memory import pretends, refuses_memory
from smalti.ops.native import load_native

SOURCE = Path(__file__).with_name("pointwise.c")
ROWS = 32  # tokens of a block, as in pointwise.c

_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_ROWS = [_INT, _INT, _SIZE, _SIZE, _SIZE, _SIZE]  # two types, batch, tokens, channels, stride of the modulation
_ARGUMENTS = {
    "gelu": [_INT, _INT, _SIZE, _POINTER, _POINTER, _POINTER, _INT],
    "gelu_product": [_INT, _SIZE, *[_POINTER] * 3, _INT],
    "gelu_product_back": [_INT, _SIZE, *[_POINTER] * 5, _INT],
    "adaln": [*_ROWS, _POINTER, _POINTER, _POINTER, ctypes.c_float, _POINTER, _POINTER, _INT],
    "adaln_back": [*_ROWS, *[_POINTER] * 7, _INT],
    "gated_add": [*_ROWS, *[_POINTER] * 4, _INT],
    "gated_add_back": [*_ROWS, *[_POINTER] * 6, _INT],
}


@cache
def unavailable() -> str:
    """Why the C twins cannot run on this machine; "" when they can. Compiles them when asked for the first time."""
    reason = load_native(SOURCE).reason
    if reason:
        logging.getLogger("smalti").warning(
            "GELU, norms and gates run in their slower PyTorch form, which makes a bfloat16 DiT on a CPU a quarter "
            "slower: %s",
            reason,
        )
    return reason


def refuses_c(*tensors: Tensor) -> str:
    """What every C twin refuses; "" when there is nothing against these inputs."""
    return refuses_memory(*tensors) or unavailable()


def refuses_rows(x: Tensor, *modulation: Tensor) -> str:
    """What twins over tokens (B, N, D) with modulations (B or 1, 1, D) refuse beside `refuses_c`."""
    shapes = {tuple(m.shape) for m in modulation}
    if x.ndim != 3 or len(shapes) != 1 or next(iter(shapes)) not in {(n, 1, x.shape[2]) for n in (1, x.shape[0])}:
        return f"it wants shapes (B, N, D) and (B, 1, D) or (1, 1, D), got {tuple(x.shape)} and {sorted(shapes)}"
    return ""


def call(function: str, *arguments: "Tensor | float | None") -> None:
    """Call a function of pointwise.c; tensors go as addresses, None as NULL, the number of threads comes last."""
    if pretends(*arguments):
        return
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    getattr(_library(), function)(*values, torch.get_num_threads())


def modulation_rows(*modulation: Tensor) -> tuple[list[Tensor], int]:
    """Modulations as C reads them, float32 with one stride between batch items; 0 for one that all share."""
    rows = [m.float() for m in modulation]
    shared_in_disguise = len(rows[0]) > 1 and rows[0].stride(0) == 0  # expanded: its gradient has a row for each item
    if len({r.stride() for r in rows}) != 1 or rows[0].stride(2) != 1 or shared_in_disguise:
        rows = [r.contiguous() for r in rows]
    return rows, rows[0].stride(0) if len(rows[0]) > 1 else 0


def partial_sums(x: Tensor, rows: int) -> Tensor:
    """Room for sums over the tokens of each block."""
    batch, tokens, channels = x.shape
    return torch.empty(batch * -(-tokens // ROWS) * rows * channels, dtype=torch.float32)


@cache
def _library() -> ctypes.CDLL:
    library = load_native(SOURCE).library
    if library is None:
        raise RuntimeError(f"a C twin was called where it refuses to run: {unavailable()}")
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library
