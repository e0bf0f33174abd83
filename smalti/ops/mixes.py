"""The library behind the C twins of mixes.c."""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from smalti.ops.in_memory import pretends, refuses_memory
from smalti.ops.native import load_native

SOURCE = Path(__file__).with_name("mixes.c")

_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
# Types, sizes and addresses of each function; the number of threads comes last.
_ARGUMENTS = {
    "squared_relu": (1, 1, 3),
    "sigmoid_gate": (1, 1, 3),
    "sigmoid_gate_back": (1, 1, 5),
    "shift_mix": (2, 12, 3),
    "shift_mix_back": (2, 12, 6),
    "cosine_heads": (1, 4, 5),
    "cosine_heads_back": (1, 4, 8),
}


def refuses_c(*tensors: Tensor) -> str:
    """What every twin of mixes.c refuses; "" when there is nothing against these inputs."""
    return refuses_memory(*tensors) or unavailable()


@cache
def unavailable() -> str:
    """Why there is no library on this machine; "" when there is one. Compiles it when asked for the first time."""
    reason = load_native(SOURCE).reason
    if reason:
        logging.getLogger("smalti").warning(
            "shifts, gates and heads run in their slower PyTorch form, which makes a Diffusion-RWKV or U-DiT on a CPU "
            "up to 1.5 times slower: %s",
            reason,
        )
    return reason


def call(function: str, *arguments: Tensor | int | None) -> None:
    """Call a function of mixes.c; tensors go as addresses, None as NULL."""
    if pretends(*arguments):
        return
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    if getattr(_library(), function)(*values, torch.get_num_threads()):
        raise MemoryError(f"{function} found no memory for a row of tokens")


@cache
def _library() -> ctypes.CDLL:
    library = load_native(SOURCE).library
    if library is None:
        raise RuntimeError(f"a C twin was called where it refuses to run: {unavailable()}")
    for name, (types, sizes, addresses) in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [*[_INT] * types, *[_SIZE] * sizes, *[_POINTER] * addresses, _INT]
        function.restype = _INT if name.startswith("shift_mix") else None
    return library
