"""Twin of the convolution: both directions are one circular kernel, so one transform in and one out do for both."""

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from smalti.ops.s4d.precision import wide


def two_way_conv_fft(
    x: Float[Tensor, "B C N"],
    forward: Float[Tensor, "C N"],
    backward: Float[Tensor, "C N"],
    skip: Float[Tensor, "C"],
) -> Float[Tensor, "B C N"]:
    """As `two_way_conv_reference`."""
    return convolve(x, two_way_spectrum(forward, backward), skip)


def two_way_spectrum(forward: Float[Tensor, "C N"], backward: Float[Tensor, "C N"]) -> Complex[Tensor, "C F"]:
    """What of a convolution depends on its kernels alone; whoever keeps the kernels may keep this instead."""
    dtype = wide(forward.dtype)
    size = fft_size(forward.shape[1])
    gap = size - 2 * forward.shape[1]
    return torch.fft.rfft(torch.cat([F.pad(forward.to(dtype), (0, gap)), backward.to(dtype).flip(1)], dim=1))


def convolve(
    x: Float[Tensor, "B C N"], spectrum: Complex[Tensor, "C F"], skip: Float[Tensor, "C"]
) -> Float[Tensor, "B C N"]:
    """Convolve with the kernels that `two_way_spectrum` looked at, in float32 at least."""
    size, u = fft_size(x.shape[2]), x.to(wide(x.dtype))
    y = torch.fft.irfft(torch.fft.rfft(u, size) * spectrum, size)[..., : x.shape[2]]
    return torch.addcmul(y, u, skip.to(u.dtype)[:, None]).to(x.dtype)


def fft_size(length: int) -> int:
    """Room for 2 N lags, in the next even size that has no prime factor above 5."""
    size = 2 * length
    while not _smooth(size):
        size += 2
    return size


def _smooth(number: int) -> bool:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number == 1
