"""Twins in C for CPUs, of the convolution (conv.c) and the kernel (kernel.c), compiled at their first use.

Without a compiler the FFT and the matrix product in PyTorch take their places.
"""

import cmath
import ctypes
import logging
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.in_memory import KINDS, plain_gradients, pretends, refuses_memory
from smalti.ops.native import load_native
from smalti.ops.s4d.fft import two_way_conv_fft
from smalti.ops.s4d.reference import Discretization
from smalti.ops.s4d.two_level import sampled, sum_of_powers

CONV, KERNEL = (Path(__file__).with_name(name) for name in ("conv.c", "kernel.c"))


def s4d_kernel_c(
    log_dt: Float[Tensor, "C"],
    log_decay: Float[Tensor, "C S"],
    frequency: Float[Tensor, "C S"],
    weight: Float[Tensor, "C S 2"],
    length: int = 1024,
    discretization: Discretization = "zoh",
) -> Float[Tensor, "C L"]:
    """As `s4d_kernel_reference`; powers are made in float64."""
    system = sampled(log_dt, log_decay, frequency, weight, discretization)
    return _SumOfPowers.apply(*system, length).to(log_dt.dtype)


def two_way_conv_c(
    x: Float[Tensor, "B C N"],
    forward: Float[Tensor, "C N"],
    backward: Float[Tensor, "C N"],
    skip: Float[Tensor, "C"],
) -> Float[Tensor, "B C N"]:
    """As `two_way_conv_reference`. Token-major in memory is what it reads and writes: (B, N, C) seen as (B, C, N)."""
    if not forward.shape == backward.shape == x.shape[1:] or skip.shape != x.shape[1:2] or x.ndim != 3:
        shapes = [tuple(t.shape) for t in (x, forward, backward, skip)]
        raise ValueError(f"expected shapes (B, C, N), (C, N), (C, N), (C), got {shapes}")
    return _TwoWayConv.apply(x.mT, forward, backward, skip).mT


def refuses_c(*tensors: Tensor) -> str:
    """Why the C twin cannot take these inputs on this machine; "" when it can. Compiles it when first asked."""
    if reason := refuses_memory(*tensors):
        return reason
    if tensors[0].shape[-1] == 0:
        return f"there is nothing to convolve, got shape {tuple(tensors[0].shape)}"
    return unavailable()


@cache
def unavailable() -> str:
    """Why there are no libraries on this machine; "" when there are."""
    reason = load_native(CONV).reason or load_native(KERNEL).reason
    if reason:
        logging.getLogger("smalti").warning(
            "state spaces run by FFT in PyTorch, which makes them 3 to 5 times slower than in C: %s", reason
        )
    return reason


def spectrum_c(
    forward: Float[Tensor, "C N"], backward: Float[Tensor, "C N"], skip: Float[Tensor, "C"]
) -> Float[Tensor, "S"]:
    """What of a convolution depends on its kernels alone, for `convolve_c`, without gradients."""
    channels, tokens = forward.shape
    rows = [t.detach().float().contiguous() for t in (forward, backward, skip)]
    size, leaf, turns = _plan(tokens)
    spectrum = torch.empty(_length(tokens, channels), dtype=torch.float32)
    _run("s4d_spectrum", size, leaf, turns, channels, tokens, *rows, spectrum)
    return spectrum


def convolve_c(x: Float[Tensor, "B N C"], spectrum: Float[Tensor, "S"]) -> Float[Tensor, "B N C"]:
    """Convolve with the kernels of `spectrum_c`, which must be of as many tokens and channels; without gradients."""
    if x.ndim != 3 or spectrum.shape != (_length(*x.shape[1:]),):
        raise ValueError(f"a spectrum of shape {tuple(spectrum.shape)} is not for tokens of shape {tuple(x.shape)}")
    x = x.detach().contiguous()
    y = torch.empty_like(x)
    _run("s4d_convolve", KINDS[x.dtype], *_plan(x.shape[1]), *x.shape, spectrum, x, y)
    return y


class _SumOfPowers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, re: Tensor, im: Tensor, w_re: Tensor, w_im: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(re, im, w_re, w_im)
        ctx.length = length
        output = torch.empty(len(re), length, dtype=torch.float32)
        system = [t.contiguous() for t in (re, im, w_re, w_im)]
        _run("s4d_powers", *re.shape, length, *system, output)
        return output

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        system = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *plain_gradients(partial(sum_of_powers, length=ctx.length), system, above, create_graph=True), None
        gradients = [torch.empty(t.shape, dtype=torch.float32) for t in system]
        rooms = [t.contiguous() for t in (*system, above)]
        _run("s4d_powers_back", *system[0].shape, ctx.length, *rooms, *gradients)
        return *gradients, None


class _TwoWayConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor, skip: Tensor) -> Tensor:
        spectrum = spectrum_c(forward, backward, skip)
        ctx.save_for_backward(x, forward, backward, skip, spectrum)
        return convolve_c(x, spectrum)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, spectrum = ctx.saved_tensors
        x, forward, _, skip = inputs
        if torch.is_grad_enabled():
            return plain_gradients(
                lambda x, *rows: two_way_conv_fft(x.mT, *rows).mT, tuple(inputs), above, create_graph=True
            )
        x, above = x.contiguous(), above.contiguous()
        by_x = torch.empty_like(x)
        by_forward, by_backward = torch.empty(2, *forward.shape, dtype=torch.float32)
        by_skip = torch.empty(skip.shape, dtype=torch.float32)
        rooms = (spectrum, x, above, by_x, by_forward, by_backward, by_skip)
        _run("s4d_convolve_back", KINDS[x.dtype], *_plan(x.shape[1]), *x.shape, *rooms)
        return by_x, *(t.to(forward.dtype) for t in (by_forward, by_backward)), by_skip.to(skip.dtype)


def _length(tokens: int, channels: int) -> int:
    """Numbers in a spectrum: channels come in blocks, the last of which may be half empty."""
    lanes = _function("s4d_lanes")()
    return -(-channels // lanes) * lanes * 2 * _plan(tokens)[0]


@cache
def _plan(tokens: int) -> tuple[int, int, Any]:
    """For so many tokens: M, c and the constants of conv.c."""
    size, leaf = min((leaf << max(1, math.ceil(math.log2(tokens / leaf))), leaf) for leaf in (1, 3, 5, 7))
    angles = [0.0, math.pi]
    while len(angles) <= max(4, size // leaf):
        angles += [angles[len(angles) // 2] / 2 + i * math.pi for i in (0, 1)]
    turns = [cmath.exp(0.5j * angle) for angle in angles]
    # No tensor: it is kept, and whoever asks first may be tracing tensors without numbers.
    return size, leaf, (ctypes.c_float * (2 * len(turns)))(*(p for turn in turns for p in (turn.real, turn.imag)))


def _run(function: str, *arguments: Any) -> None:
    if pretends(*arguments):
        return
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if _function(function)(*values, torch.get_num_threads()):
        raise MemoryError("a long convolution found no memory for its sums: use fewer tokens or threads")


_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: dict[str, list[Any]] = {
    "s4d_lanes": [],
    "s4d_spectrum": [_SIZE, _SIZE, _POINTER, *[_SIZE] * 2, *[_POINTER] * 4, _INT],
    "s4d_convolve": [_INT, _SIZE, _SIZE, _POINTER, *[_SIZE] * 3, *[_POINTER] * 3, _INT],
    "s4d_convolve_back": [_INT, _SIZE, _SIZE, _POINTER, *[_SIZE] * 3, *[_POINTER] * 7, _INT],
    "s4d_powers": [*[_SIZE] * 3, *[_POINTER] * 5, _INT],
    "s4d_powers_back": [*[_SIZE] * 3, *[_POINTER] * 9, _INT],
}


@cache
def _function(name: str) -> Any:
    library = load_native(KERNEL if "powers" in name else CONV).library
    if library is None:
        raise RuntimeError(f"a C twin of the state space was called where it refuses to run: {unavailable()}")
    function = getattr(library, name)
    function.argtypes = _ARGUMENTS[name]
    return function
