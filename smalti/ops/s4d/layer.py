"""State space and convolution in one: the definition, and its twins, which are those of its halves."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.s4d.c import s4d_kernel_c, two_way_conv_c
from smalti.ops.s4d.fft import two_way_conv_fft
from smalti.ops.s4d.precision import wide
from smalti.ops.s4d.reference import Discretization, s4d_kernel_reference, two_way_conv_reference
from smalti.ops.s4d.two_level import s4d_kernel_two_level


def s4d_reference(
    x: Float[Tensor, "B C N"],
    log_dt: Float[Tensor, "R C"],
    log_decay: Float[Tensor, "R C S"],
    frequency: Float[Tensor, "R C S"],
    weight: Float[Tensor, "Q C S 2"],
    skip: Float[Tensor, "C"],
    discretization: Discretization = "zoh",
) -> Float[Tensor, "B C N"]:
    """`two_way_conv_reference` with the kernels of `s4d_kernel_reference`.

    Args:
        log_dt, log_decay, frequency: one row for all directions, or one for each.
        weight: one row = each token sees itself and those before it; a second one = those behind it too.
    """
    kernels = both_kernels(s4d_kernel_reference, log_dt, log_decay, frequency, weight, x.shape[2], discretization)
    return two_way_conv_reference(x, *kernels, skip)


def s4d_c(
    x: Float[Tensor, "B C N"],
    log_dt: Float[Tensor, "R C"],
    log_decay: Float[Tensor, "R C S"],
    frequency: Float[Tensor, "R C S"],
    weight: Float[Tensor, "Q C S 2"],
    skip: Float[Tensor, "C"],
    discretization: Discretization = "zoh",
) -> Float[Tensor, "B C N"]:
    """As `s4d_reference`; token-major in memory is what it reads and writes."""
    rows = (log_dt, log_decay, frequency, weight)
    kernels = both_kernels(s4d_kernel_c, *rows, x.shape[2], discretization)
    return two_way_conv_c(x, *kernels, skip)


def s4d_fft(
    x: Float[Tensor, "B C N"],
    log_dt: Float[Tensor, "R C"],
    log_decay: Float[Tensor, "R C S"],
    frequency: Float[Tensor, "R C S"],
    weight: Float[Tensor, "Q C S 2"],
    skip: Float[Tensor, "C"],
    discretization: Discretization = "zoh",
) -> Float[Tensor, "B C N"]:
    """As `s4d_reference`."""
    # Without numbers nothing is slow, and a counter of matrix products would take the kernel, which is made once for
    # all images, for work on each.
    kernel = s4d_kernel_reference if x.device.type == "meta" else s4d_kernel_two_level
    kernels = both_kernels(kernel, log_dt, log_decay, frequency, weight, x.shape[2], discretization)
    return two_way_conv_fft(x, *kernels, skip)


def both_kernels(
    kernel: Callable[..., Tensor],
    log_dt: Float[Tensor, "R C"],
    log_decay: Float[Tensor, "R C S"],
    frequency: Float[Tensor, "R C S"],
    weight: Float[Tensor, "Q C S 2"],
    length: int,
    discretization: Discretization,
) -> tuple[Float[Tensor, "C L"], Float[Tensor, "C L"]]:
    """Forward and backward kernel of a layer, in float32 at least; with one row of weights the second is zero."""
    directions, dtype = len(weight), wide(weight.dtype)
    rows = [p.to(dtype).expand(directions, *p.shape[1:]).flatten(0, 1) for p in (log_dt, log_decay, frequency)]
    both = kernel(*rows, weight.to(dtype).flatten(0, 1), length=length, discretization=discretization)
    both = both.unflatten(0, (directions, -1))
    return both[0], both[1] if directions > 1 else torch.zeros_like(both[0])
