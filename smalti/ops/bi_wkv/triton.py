"""Bi-WKV on CUDA: one Triton kernel each way, any number of tokens and channels, sums in float32.

Nothing here imports triton before the first launch. Has run under Triton's interpreter only: see docs/gpu.md.
"""

from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE_TOKENS = 1024  # up to here the sequence is one chunk, read once; longer ones are read twice
CHUNK_TOKENS = 128
INSTALLED = find_spec("triton") is not None  # looked up once, because a compiler cannot trace it; imports nothing
TILE = 8192  # numbers of one tensor that a program holds at a time


def triton_refusal(args: tuple[Tensor, ...]) -> str:
    """Why the kernels cannot take these inputs; "" = they can."""
    _, _, key, value = args
    for x in args:
        if x.device.type != "cuda":
            return f"it is for CUDA, got {x.device.type}"
        if x.dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, got {x.dtype}"
    if key.dtype != value.dtype:
        return f"key and value must have one dtype, got {key.dtype} and {value.dtype}"
    if not key.numel():
        return f"there is nothing to do for a key of shape {tuple(key.shape)}"
    if not INSTALLED:
        return "triton, which compiles its kernels for CUDA, is not installed: pip install triton"
    return ""


def bi_wkv_triton(
    decay: Float[Tensor, "C"], bonus: Float[Tensor, "C"], key: Float[Tensor, "B N C"], value: Float[Tensor, "B N C"]
) -> Float[Tensor, "B N C"]:
    """`bi_wkv_reference` by kernels; the output and the gradients have the dtypes of the inputs.

    Gradients are the same bits in every run: sums over tokens have a fixed order, those over the batch are torch's.
    """
    save = torch.is_grad_enabled() and any(x.requires_grad for x in (decay, bonus, key, value))
    out, _, _ = _forward(decay, bonus, key, value, save)
    return out


def launch_settings(tokens: int) -> dict[str, Any]:
    """Sizes of a program: tokens N and channels C of a tile, the number of its chunks, and its warps."""
    rows = CHUNK_TOKENS if tokens > WHOLE_TOKENS else max(16, 1 << (tokens - 1).bit_length())
    columns = min(16, TILE // rows)
    return {"CHUNKS": -(-tokens // rows), "N": rows, "C": columns, "num_warps": max(1, min(16, rows * columns // 256))}


@torch.library.custom_op("smalti::bi_wkv_triton", mutates_args=())
def _forward(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The mean; if asked to save for the way back, also the mean in float32 unless it is that already, and the log of
    its denominator."""
    from smalti.ops.bi_wkv import triton_kernels

    decay, bonus, key, value = (x.contiguous() for x in (decay, bonus, key, value))
    out, mean, lse = _forward_like(decay, bonus, key, value, save)
    batch, tokens, channels = key.shape
    settings = launch_settings(tokens)
    triton_kernels.forward[_grid(batch, channels, settings)](
        decay, bonus, key, value, out, mean, lse, _carry(key, 3, settings), tokens, channels,
        SAVE=save, ROUNDED=mean.numel() > 0, **settings,
    )  # fmt: skip
    return out, mean, lse


@_forward.register_fake
def _forward_like(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    # Gradients of key and decay are made of value - mean: rounded to half precision, little would be left of it.
    mean = key.new_empty(key.shape if save and out.dtype != torch.float32 else (0,), dtype=torch.float32)
    return out, mean, key.new_empty(key.shape if save else (0,), dtype=torch.float32)


@torch.library.custom_op("smalti::bi_wkv_triton_backward", mutates_args=())
def _backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, mean: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key and value, then of decay and bonus for each batch item."""
    from smalti.ops.bi_wkv import triton_kernels

    decay, bonus, key, value, grad = (x.contiguous() for x in (decay, bonus, key, value, grad))
    grad_key, grad_value, grad_decay, grad_bonus = _backward_like(decay, bonus, key, value, mean, lse, grad)
    batch, tokens, channels = key.shape
    settings = launch_settings(tokens)
    triton_kernels.backward[_grid(batch, channels, settings)](
        decay, bonus, key, value, mean, lse, grad, grad_decay, grad_bonus, grad_key, grad_value,
        _carry(key, 5, settings), tokens, channels, **settings,
    )  # fmt: skip
    return grad_key, grad_value, grad_decay, grad_bonus


@_backward.register_fake
def _backward_like(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, mean: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_key, grad_value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))
    grad_decay, grad_bonus = (key.new_empty(key.shape[0], key.shape[2], dtype=torch.float32) for _ in range(2))
    return grad_key, grad_value, grad_decay, grad_bonus


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    decay, bonus, key, value, save = inputs
    out, mean, lse = output
    ctx.mark_non_differentiable(mean, lse)
    if save:
        ctx.save_for_backward(decay, bonus, key, value, mean if mean.numel() else out, lse)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    decay, bonus, key, value, mean, lse = ctx.saved_tensors
    grad_key, grad_value, grad_decay, grad_bonus = _backward(decay, bonus, key, value, mean, lse, grad)
    return grad_decay.sum(dim=0).to(decay.dtype), grad_bonus.sum(dim=0).to(bonus.dtype), grad_key, grad_value, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _grid(batch: int, channels: int, settings: dict[str, Any]) -> tuple[int]:
    return (batch * -(-channels // settings["C"]),)


def _carry(key: Tensor, rows: int, settings: dict[str, Any]) -> Tensor:
    """Room for the sums that enter each chunk from the right, written and read by the program of the same channels."""
    chunks = settings["CHUNKS"] if settings["CHUNKS"] > 1 else 0
    return key.new_empty(key.shape[0], chunks, rows, key.shape[2], dtype=torch.float32)
