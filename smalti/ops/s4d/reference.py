"""The definitions. Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space models",
arXiv:2206.11893, sec. 3.1; two directions as in Wang et al. 2022, arXiv:2212.10544 (which DiffuSSM builds on)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.s4d.precision import no_autocast, wide

Discretization = Literal["zoh", "bilinear"]


def s4d_kernel_reference(
    log_dt: Float[Tensor, "C"],
    log_decay: Float[Tensor, "C S"],
    frequency: Float[Tensor, "C S"],
    weight: Float[Tensor, "C S 2"],
    length: int = 1024,
    discretization: Discretization = "zoh",
) -> Float[Tensor, "C L"]:
    """Impulse response of a diagonal state space: what a one at token 0 leaves at tokens 0 .. length - 1.

    Each channel has S complex states, each standing for itself and its conjugate, with step dt = exp(log_dt) and
    A = -exp(log_decay) + i frequency:

        zoh       K_l = 2 Re sum_n w_n (e^(dt A_n) - 1) / A_n e^(l dt A_n)
        bilinear  K_l = 2 Re sum_n w_n dt / (1 - dt A_n / 2) ((1 + dt A_n / 2) / (1 - dt A_n / 2))^l

    Args:
        weight: real and imaginary part of the product of input and output vector, B C.
        length: how many lags; the default is the 32 x 32 latents of a 256-pixel image.
        discretization: how the continuous system is sampled.
    """
    dtype = wide(log_dt.dtype)
    dt = log_dt.to(dtype).exp()[:, None]
    a = torch.complex(-log_decay.to(dtype).exp(), frequency.to(dtype))
    w = torch.view_as_complex(weight.to(dtype).contiguous())
    z = dt * a
    if discretization == "zoh":
        w, step = w * (z.exp() - 1) / a, z
    else:
        w, step = w * dt / (1 - z / 2), ((1 + z / 2) / (1 - z / 2)).log()
    lags = torch.arange(length, device=log_dt.device)
    return 2 * (w[..., None] * (step[..., None] * lags).exp()).sum(dim=1).real.to(log_dt.dtype)


def two_way_conv_reference(
    x: Float[Tensor, "B C N"],
    forward: Float[Tensor, "C N"],
    backward: Float[Tensor, "C N"],
    skip: Float[Tensor, "C"],
) -> Float[Tensor, "B C N"]:
    """Each token gathers those before it, itself, and those behind it, per channel.

        y_n = skip x_n + sum_{j >= 0} forward_j x_{n - j} + sum_{j >= 0} backward_j x_{n + 1 + j}

    `backward` begins at the next token, so that a token does not meet itself twice; its last entry reaches nobody.
    """
    length, dtype = x.shape[2], wide(x.dtype)
    n = torch.arange(length, device=x.device)
    distance = n[:, None] - n[None, :]  # (N, N), of an output token from an input token
    row = torch.cat([backward.flip(1), forward], dim=1).to(dtype)  # lags -N .. N - 1
    toeplitz = row[:, distance + length] + torch.where(distance == 0, skip.to(dtype)[:, None, None], 0)
    with no_autocast(x.device):
        return torch.einsum("cnm,bcm->bcn", toeplitz, x.to(dtype)).to(x.dtype)
