"""Twin of the kernel: with l = P q + j, e^(l z) = e^(P q z) e^(j z), so all lags are one batched real matrix product.

P + L / P exponentials per state instead of L, and no complex tensor; autograd goes through it as it stands.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.ops.s4d.precision import no_autocast, wide
from smalti.ops.s4d.reference import Discretization


def s4d_kernel_two_level(
    log_dt: Float[Tensor, "C"],
    log_decay: Float[Tensor, "C S"],
    frequency: Float[Tensor, "C S"],
    weight: Float[Tensor, "C S 2"],
    length: int = 1024,
    discretization: Discretization = "zoh",
) -> Float[Tensor, "C L"]:
    """As `s4d_kernel_reference`."""
    re, im, w_re, w_im = sampled(log_dt, log_decay, frequency, weight, discretization)
    return sum_of_powers(re, im, w_re, w_im, length).to(log_dt.dtype)


def sampled(
    log_dt: Float[Tensor, "C"],
    log_decay: Float[Tensor, "C S"],
    frequency: Float[Tensor, "C S"],
    weight: Float[Tensor, "C S 2"],
    discretization: Discretization,
) -> tuple[Float[Tensor, "C S"], Float[Tensor, "C S"], Float[Tensor, "C S"], Float[Tensor, "C S"]]:
    """The discrete system: the logarithm z of one step and the weight w in K_l = Re sum_n w_n e^(l z_n), as re, im."""
    dtype = wide(log_dt.dtype)
    dt = log_dt.to(dtype).exp()[:, None]
    a_re, a_im = -log_decay.to(dtype).exp(), frequency.to(dtype)
    re, im = dt * a_re, dt * a_im  # dt A, then the logarithm of one step
    if discretization == "zoh":
        # e^z - 1 without its cancellation for short steps.
        grown_re = torch.expm1(re) * im.cos() - 2 * (im / 2).sin().square()
        grown_im = re.exp() * im.sin()
        size = a_re.square() + a_im.square()
        gain_re, gain_im = (grown_re * a_re + grown_im * a_im) / size, (grown_im * a_re - grown_re * a_im) / size
    else:
        size = (1 - re / 2).square() + (im / 2).square()
        gain_re, gain_im = dt * (1 - re / 2) / size, dt * im / 2 / size
        angle = torch.atan2(im / 2, 1 + re / 2) + torch.atan2(im / 2, 1 - re / 2)
        re, im = torch.log1p(2 * re / size) / 2, angle
    w_re, w_im = weight.to(dtype).unbind(-1)
    w_re, w_im = 2 * (w_re * gain_re - w_im * gain_im), 2 * (w_re * gain_im + w_im * gain_re)
    return re, im, w_re, w_im


def sum_of_powers(
    re: Float[Tensor, "C S"],
    im: Float[Tensor, "C S"],
    w_re: Float[Tensor, "C S"],
    w_im: Float[Tensor, "C S"],
    length: int,
) -> Float[Tensor, "C L"]:
    """K_l = Re sum_n w_n e^(l z_n) for l = 0 .. length - 1."""
    dtype = re.dtype
    fine = 32 if length <= 2048 else 64  # P, near the square root of the length
    coarse = -(-length // fine)
    fine_re, fine_im = _powers(re, im, torch.arange(fine, dtype=dtype, device=re.device))
    far_re, far_im = _powers(re, im, torch.arange(0, coarse * fine, fine, dtype=dtype, device=re.device))
    w_re, w_im = w_re[..., None], w_im[..., None]
    rows = torch.cat([w_re * far_re - w_im * far_im, -w_re * far_im - w_im * far_re], dim=1)  # (C, 2 S, L / P)
    columns = torch.cat([fine_re, fine_im], dim=1)  # (C, 2 S, P)
    with no_autocast(re.device):
        return (rows.mT @ columns).flatten(1)[:, :length]


def _powers(re: Tensor, im: Tensor, lags: Tensor) -> tuple[Tensor, Tensor]:
    size, angle = (re[..., None] * lags).exp(), im[..., None] * lags
    return size * angle.cos(), size * angle.sin()
