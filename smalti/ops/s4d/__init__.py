"""S4D: the convolution kernel of a diagonal state space, and the long convolution in both directions."""

import math

import torch
from torch import Tensor

from smalti.ops.dispatch import Op
from smalti.ops.s4d.c import convolve_c, refuses_c, s4d_kernel_c, spectrum_c, two_way_conv_c
from smalti.ops.s4d.fft import convolve, fft_size, two_way_conv_fft, two_way_spectrum
from smalti.ops.s4d.layer import both_kernels, s4d_c, s4d_fft, s4d_reference
from smalti.ops.s4d.reference import Discretization, s4d_kernel_reference, two_way_conv_reference
from smalti.ops.s4d.two_level import s4d_kernel_two_level


def _refuses_kernel(impl: str, args: tuple[Tensor, ...]) -> str:
    if impl == "c":
        return refuses_c(*args)
    # Else a counter of matrix products would take the kernel, which is made once for a whole batch, for work per image.
    return "it only pays where there are numbers, got meta tensors" if args[0].device.type == "meta" else ""


def _refuses_conv(impl: str, args: tuple[Tensor, ...]) -> str:
    return refuses_c(*args) if impl == "c" else ""


def _example_kernel(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, channels: int = 6, states: int = 8
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    log_dt = math.log(1e-3) + math.log(100) * torch.rand(channels, generator=generator)
    log_decay = math.log(0.5) + 0.3 * torch.randn(channels, states, generator=generator)
    frequency = math.pi * torch.arange(states) + torch.randn(channels, states, generator=generator)
    weight = torch.randn(channels, states, 2, generator=generator)
    return tuple(x.to(dtype).requires_grad_() for x in (log_dt, log_decay, frequency, weight))


def _example_conv(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 12
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, tokens, generator=generator)
    # As the kernels of a fresh layer: decaying, over lengths of which some are beyond the sequence.
    decay = torch.exp(-torch.arange(tokens) / (1 + 200 * torch.rand(channels, 1, generator=generator)))
    forward, backward = decay * torch.randn(2, channels, tokens, generator=generator)
    skip = torch.randn(channels, generator=generator)
    return tuple(t.to(dtype).requires_grad_() for t in (x, forward, backward, skip))


def _example_layer(
    tokens: int, dtype: torch.dtype, *, seed: int = 0, batch: int = 2, channels: int = 6, states: int = 8
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, tokens, generator=generator)
    two = (_example_kernel(tokens, torch.float32, seed=2 * seed + i, channels=channels, states=states) for i in (0, 1))
    rows = [torch.stack(pair).detach() for pair in zip(*two, strict=True)]
    skip = torch.randn(channels, generator=generator)
    return tuple(t.to(dtype).requires_grad_() for t in (x, *rows, skip))


def _macs_kernel(
    log_dt: Tensor, log_decay: Tensor, frequency: Tensor, weight: Tensor, length: int = 1024
) -> dict[str, int]:
    # The real part of a complex product for each state and lag.
    return {"kernel": weight.numel() * length}


def _macs_conv(x: Tensor, forward: Tensor, backward: Tensor, skip: Tensor) -> dict[str, int]:
    size = fft_size(x.shape[2])
    transform = round(2.5 * size * math.log2(size)) // 2  # a real transform; two operations are one multiply-add
    rows = x.shape[0] * x.shape[1]
    product = 4 * (size // 2 + 1)  # of complex numbers, four multiply-adds each
    return {"fft": rows * (2 * transform + product), "kernel": x.shape[1] * transform}


def _macs_layer(
    x: Tensor, log_dt: Tensor, log_decay: Tensor, frequency: Tensor, weight: Tensor, skip: Tensor
) -> dict[str, int]:
    conv = _macs_conv(x, x, x, skip)
    kernel = _macs_kernel(log_dt, log_decay, frequency, weight, x.shape[2])
    return {"fft": conv["fft"], "kernel": conv["kernel"] + kernel["kernel"]}


# Channels take the place of the batch: the kernels of a layer do not depend on the images.
s4d_kernel = Op(
    "s4d_kernel",
    s4d_kernel_reference,
    {"c": s4d_kernel_c, "two_level": s4d_kernel_two_level},
    _refuses_kernel,
    _example_kernel,
    _macs_kernel,
)
two_way_conv = Op(
    "two_way_conv",
    two_way_conv_reference,
    {"c": two_way_conv_c, "fft": two_way_conv_fft},
    _refuses_conv,
    _example_conv,
    _macs_conv,
    batched=(0,),
)
# What networks call; the two halves stand beside it for those who keep a kernel, and to be measured alone.
_FAST = {"c": s4d_c, "fft": s4d_fft}
s4d = Op("s4d", s4d_reference, _FAST, _refuses_conv, _example_layer, _macs_layer, batched=(0,))

__all__ = [
    "Discretization",
    "both_kernels",
    "convolve",
    "convolve_c",
    "fft_size",
    "s4d",
    "s4d_kernel",
    "spectrum_c",
    "two_way_conv",
    "two_way_spectrum",
]
