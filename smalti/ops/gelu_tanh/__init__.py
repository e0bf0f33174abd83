"""GELU in its tanh approximation, the activation of DiT."""

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.gelu_tanh.aten import gelu_tanh_aten
from smalti.ops.gelu_tanh.reference import gelu_tanh_reference
from smalti.ops.gelu_tanh.table import gelu_tanh_table


def _refuses(impl: str, args: tuple[Tensor, ...]) -> str:
    (x,) = args
    if impl == "table":
        if torch.compiler.is_compiling():
            return "a compiler fuses the formula better than a look-up"
        if x.dtype is not torch.bfloat16 or x.device.type != "cpu":
            return f"it is for bfloat16 on CPUs, got {x.dtype} on {x.device.type}"
    return ""


def _example(tokens: int, dtype: torch.dtype, *, seed: int = 0, channels: int = 24) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, tokens, channels, generator=generator).mul(3).to(dtype).requires_grad_(),)


gelu_tanh = Op("gelu_tanh", gelu_tanh_reference, {"table": gelu_tanh_table, "aten": gelu_tanh_aten}, _refuses, _example)
