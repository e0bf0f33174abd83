"""Twin in C for CPUs (bi_wkv.c), compiled at its first use; without a compiler the prefix form takes its place."""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.in_memory import pretends
from smalti.ops.native import load_native

# As in the enum of bi_wkv.c.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
SOURCE = Path(__file__).with_name("bi_wkv.c")


def bi_wkv_c(
    decay: Float[Tensor, "C"], bonus: Float[Tensor, "C"], key: Float[Tensor, "B N C"], value: Float[Tensor, "B N C"]
) -> Float[Tensor, "B N C"]:
    """As `bi_wkv_reference`, in two passes over the tokens; sums in float32, or float64 where the range asks for it."""
    inputs = (decay, bonus, key, value)
    plain = not torch.compiler.is_compiling() and (
        pretends(*inputs) or all(type(x) in (Tensor, torch.nn.Parameter) for x in inputs)
    )
    if plain and decay.device.type == "cpu" and not torch._C._are_functorch_transforms_active():
        # The same without the way through PyTorch's dispatcher, which takes longer than a few hundred tokens.
        return _BiWKV.apply(*inputs)
    return torch.ops.smalti.bi_wkv_c(*inputs)


def unavailable() -> str:
    """Why the C twin cannot run on this machine; "" when it can. Compiles it when asked for the first time."""
    return _answer()


# For torch.compile: ask the function while tracing and take its answer as a constant. This is the mark that
# torch.compiler.assume_constant_result sets, which would import the whole compiler here.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _answer() -> str:
    reason = load_native(SOURCE).reason
    if reason:
        logging.getLogger("smalti").warning(
            "Bi-WKV runs in its slower PyTorch form, 5 to 15 times slower than in C, in training 8 to 10 times: %s",
            reason,
        )
    return reason


def _forward(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = _tokens(decay, bonus, key, value)
    output = torch.empty_like(key)
    _run("bi_wkv_forward", decay, bonus, key, value, output)
    return output


def _gradients(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, above: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtypes = [x.dtype for x in (decay, bonus, key, value)]
    key, value = _tokens(decay, bonus, key, value)
    above = above.to(key.dtype).contiguous()
    by_key, by_value = torch.empty_like(key), torch.empty_like(key)
    by_decay, by_bonus = torch.empty(2, key.shape[0], key.shape[2], dtype=torch.float64)
    _run("bi_wkv_backward", decay, bonus, key, value, above, by_key, by_value, by_decay, by_bonus)
    gradients = (by_decay.sum(0), by_bonus.sum(0), by_key, by_value)
    a, b, c, d = (x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))
    return a, b, c, d


class _BiWKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(decay, bonus, key, value)
        return _forward(decay, bonus, key, value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decay, bonus, key, value = ctx.saved_tensors
        return _gradients(decay, bonus, key, value, above)


# For those who look at what PyTorch calls: compilers, tensors of other kinds.
_forward_op = torch.library.custom_op("smalti::bi_wkv_c", _forward, mutates_args=(), device_types="cpu")
_backward_op = torch.library.custom_op("smalti::bi_wkv_c_backward", _gradients, mutates_args=(), device_types="cpu")


@_forward_op.register_fake
def _(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(key, dtype=_dtype(decay, bonus, key, value), memory_format=torch.contiguous_format)


@_backward_op.register_fake
def _(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, above: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (decay, bonus, key, value))
    return a, b, c, d


def _keep(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.smalti.bi_wkv_c_backward(*ctx.saved_tensors, above)  # type: ignore[attr-defined]


_forward_op.register_autograd(_backward, setup_context=_keep)


def _dtype(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _tokens(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as C reads them; wrong sizes must not get there."""
    if not (key.dim() == 3 and key.shape == value.shape and decay.shape == bonus.shape == key.shape[2:]):
        shapes = [tuple(x.shape) for x in (decay, bonus, key, value)]
        raise ValueError(f"expected shapes (C), (C), (B, N, C), (B, N, C), got {shapes}")
    dtype = _dtype(decay, bonus, key, value)
    return key.to(dtype).contiguous(), value.to(dtype).contiguous()


def _run(function: str, decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> None:
    # Named here, because the addresses below do not keep these copies alive.
    parameters = [x.detach().double().contiguous() for x in (decay, bonus)]
    if pretends(key):
        return
    addresses = [x.data_ptr() for x in (*parameters, key, value, *others)]
    if getattr(_library(), function)(KINDS[key.dtype], *key.shape, *addresses, torch.get_num_threads()):
        raise MemoryError("Bi-WKV found no memory for its states: use a smaller batch or fewer tokens")


@cache
def _library() -> ctypes.CDLL:
    library = load_native(SOURCE).library
    if library is None:
        raise RuntimeError(f"the C twin of Bi-WKV was called where it refuses to run: {unavailable()}")
    sizes = [ctypes.c_int, *[ctypes.c_int64] * 3]
    library.bi_wkv_forward.argtypes = [*sizes, *[ctypes.c_void_p] * 5, ctypes.c_int]
    library.bi_wkv_backward.argtypes = [*sizes, *[ctypes.c_void_p] * 9, ctypes.c_int]
    return library
