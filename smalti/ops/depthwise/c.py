"""Twin in C for CPUs (depthwise.c), compiled at its first use; without a compiler PyTorch's form takes its place."""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.ops.depthwise.conv import depthwise_conv
from smalti.ops.in_memory import KINDS, lower_dtype, plain_gradients, pretends, refuses_memory
from smalti.ops.native import load_native

SIZES = (1, 3, 5)
SOURCE = Path(__file__).with_name("depthwise.c")


def depthwise_c(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `depthwise_reference`, sums in float32; under autocast the output has its dtype, as that of a convolution."""
    return _Depthwise.apply(x, weight, bias)


def refuses_c(x: Tensor, weight: Tensor, bias: Tensor) -> str:
    """Why the C twin cannot take these inputs on this machine; "" when it can. Compiles it when first asked."""
    if reason := refuses_memory(x, weight, bias):
        return reason
    size, channels = weight.shape[-1], x.shape[-1]
    if x.ndim != 4 or size not in SIZES or weight.shape != (channels, 1, size, size) or bias.shape != (channels,):
        shapes = [tuple(tensor.shape) for tensor in (x, weight, bias)]
        return f"it wants shapes (B, R, C, D), (D, 1, k, k) and (D) with k in {SIZES}, got {shapes}"
    return unavailable()


@cache
def unavailable() -> str:
    """Why there is no library on this machine; "" when there is one."""
    reason = load_native(SOURCE).reason
    if reason:
        logging.getLogger("smalti").warning(
            "depthwise convolutions run in PyTorch's form, 2 to 10 times slower than in C: %s", reason
        )
    return reason


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        y = torch.empty(x.shape, dtype=lower_dtype(x))
        x, taps, flat_bias = x.detach().contiguous(), _taps(weight), bias.detach().float().contiguous()
        _run("depthwise", x, y.dtype, weight.shape[-1], taps, flat_bias, y)
        return y

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients are to have gradients themselves
            return plain_gradients(depthwise_conv, (x, weight, bias), above, create_graph=True)
        size, channels = weight.shape[-1], x.shape[-1]
        x, above, turned = x.contiguous(), above.contiguous(), _taps(weight.flip(-2, -1))
        by_x = torch.empty_like(x)
        partial = torch.empty(x.shape[0], size**2 + 1, channels)
        sums = torch.empty(size**2 + 1, channels)
        _run("depthwise_back", x, above.dtype, size, turned, above, by_x, partial, sums)
        by_weight = sums[:-1].t().reshape(weight.shape)
        return by_x, by_weight.to(weight.dtype), sums[-1].to(bias.dtype)


def _taps(weight: Tensor) -> Tensor:
    """The kernels as C reads them: channels last, (k^2, D)."""
    return weight.detach().flatten(1).t().float().contiguous()


def _run(function: str, x: Tensor, out_dtype: torch.dtype, size: int, *others: Tensor) -> None:
    if pretends(x):
        return
    addresses = [tensor.data_ptr() for tensor in (x, *others)]
    kinds = KINDS[x.dtype], KINDS[out_dtype]
    if getattr(_library(), function)(*kinds, size, *x.shape, *addresses, torch.get_num_threads()):
        raise MemoryError("a depthwise convolution found no memory for its rows: use a smaller plane or batch")


@cache
def _library() -> ctypes.CDLL:
    library = load_native(SOURCE).library
    if library is None:
        raise RuntimeError(
            f"the C twin of the depthwise convolution was called where it refuses to run: {unavailable()}"
        )
    sizes = [*[ctypes.c_int] * 3, *[ctypes.c_int64] * 4]
    library.depthwise.argtypes = [*sizes, *[ctypes.c_void_p] * 4, ctypes.c_int]
    library.depthwise_back.argtypes = [*sizes, *[ctypes.c_void_p] * 6, ctypes.c_int]
    return library
