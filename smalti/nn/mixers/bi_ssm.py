"""Bidirectional diagonal state space (S4D), as a long convolution in both directions.

Source: Yan et al. 2023, arXiv:2311.18257, sec. 3 (DiffuSSM); Gu et al. 2022, arXiv:2206.11893 (S4D); the gated
bidirectional layer of Wang et al. 2022, arXiv:2212.10544.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.nn.layers import Grid, linear
from smalti.nn.mixers.base import ALONE, MixerConfig, Place
from smalti.ops import gelu
from smalti.ops.s4d import (
    Discretization,
    both_kernels,
    convolve,
    convolve_c,
    s4d,
    s4d_kernel,
    spectrum_c,
    two_way_spectrum,
)

Init = Literal["lin", "inv", "legs"]
Activation = Literal["gelu", "silu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "silu": F.silu}


@dataclass(frozen=True, kw_only=True)
class BiSSMConfig(MixerConfig):
    """A diagonal state space per channel and direction; the defaults give DiffuSSM-XL its 673 M parameters.

    Args:
        state_size: real states per channel, half as many complex ones.
        init: where the frequencies begin: n pi ("lin"), N/pi (N/(2n+1) - 1) ("inv"), or those of HiPPO-LegS ("legs").
        dt_range: the first step sizes are drawn log-uniformly between these.
        bidirectional: False = each token sees itself and those before it only.
        shared_dynamics: one step size, A and B for both directions, as in the released S4 layer; C is always per
            direction.
        trained_input: False = B stays at one, as in the short form of S4D.
        directions: "sum" of both directions, or "concat", which the last layer narrows again.
        activation: after the convolution.
        output: what mixes the channels at the end, a "linear" layer or a gated one ("glu").
    """

    kind: ClassVar[str] = "bi_ssm"
    state_size: int = 64
    init: Init = "lin"
    discretization: Discretization = "zoh"
    dt_range: tuple[float, float] = (1e-3, 1e-1)
    bidirectional: bool = True
    shared_dynamics: bool = False
    trained_input: bool = True
    directions: Literal["sum", "concat"] = "sum"
    activation: Activation = "gelu"
    output: Literal["linear", "glu"] = "linear"

    def __post_init__(self) -> None:
        if self.state_size < 2 or self.state_size % 2:
            raise ConfigError(f"state_size {self.state_size}: states come in conjugate pairs, choose an even number")
        low, high = self.dt_range
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"dt_range {self.dt_range}: expected two step sizes above 0, the smaller first")
        for name, known in (
            ("init", get_args(Init)),
            ("discretization", get_args(Discretization)),
            ("directions", ("sum", "concat")),
            ("activation", get_args(Activation)),
            ("output", ("linear", "glu")),
        ):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"unknown {name} {value!r}{did_you_mean(str(value), known)}")
        if not self.bidirectional and (self.shared_dynamics or self.directions == "concat"):
            raise ConfigError("shared_dynamics and directions='concat' have no meaning with bidirectional=False")
        if self.init == "legs" and not self.trained_input:
            raise ConfigError("init 'legs' begins with a B of its own: leave trained_input=True, or choose lin or inv")


class BiSSM(nn.Module):
    """Kernels from the state space, one convolution for both directions, activation, mixing of the channels.

    The grid is not used: tokens are a sequence, row by row, with those of in-context conditioning in front.

    Without gradients the spectrum of the kernels is kept from call to call. It is made again as soon as a parameter is
    another tensor, has been written to, or (on a CPU, where looking is cheap) has other values; elsewhere a write that
    PyTorch itself does not count, through `.data`, needs `forget()`. It is no part of the state, copies or pickles.
    """

    # Weight decay would pull the time constants towards those of the value zero, which is no neutral one.
    without_weight_decay: ClassVar[tuple[str, ...]] = ("log_dt", "log_decay", "frequency", "input_vector")
    # Powers of them go over the whole sequence.
    wide_parameters: ClassVar[tuple[str, ...]] = (*without_weight_decay, "output_vector", "skip")

    def __init__(self, config: BiSSMConfig, hidden_size: int, place: Place = ALONE) -> None:
        super().__init__()
        self.config = config
        directions = 2 if config.bidirectional else 1
        dynamics = 1 if config.shared_dynamics else directions
        states = config.state_size // 2
        low, high = map(math.log, config.dt_range)
        self.log_dt = nn.Parameter(torch.empty(dynamics, hidden_size).uniform_(low, high))
        self.log_decay = nn.Parameter(torch.full((dynamics, hidden_size, states), math.log(0.5)))  # of -Re A
        frequency, b = _initial_state_space(config.init, config.state_size)
        self.frequency = nn.Parameter(torch.empty(dynamics, hidden_size, states))  # Im A
        self.input_vector = (
            nn.Parameter(torch.zeros(dynamics, hidden_size, states, 2)) if config.trained_input else None
        )
        self.output_vector = nn.Parameter(torch.randn(directions, hidden_size, states, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(hidden_size))
        with torch.no_grad():
            self.frequency.copy_(frequency)
            if self.input_vector is not None:
                self.input_vector[..., 0].copy_(b)
        width = hidden_size * (2 if config.directions == "concat" else 1)
        self.out = linear(width, hidden_size * (2 if config.output == "glu" else 1))
        self._kept: tuple[Any, tuple[Tensor, ...], Tensor] | None = None

    def forward(self, x: Float[Tensor, "B N D"], grid: Grid) -> Float[Tensor, "B N D"]:
        u = x.transpose(1, 2)  # (B, D, N)
        if self.config.directions == "concat":
            u = u.repeat(1, 2, 1)
        y = _ACTIVATIONS[self.config.activation](self._convolve(u).transpose(1, 2))
        y = self.out(y)
        return F.glu(y, dim=-1) if self.config.output == "glu" else y

    def kernels(self, length: int) -> tuple[Float[Tensor, "K N"], Float[Tensor, "K N"]]:
        """What a token gives to itself and those behind it, and to those before it, beginning with its neighbour."""
        return both_kernels(s4d_kernel, *self._state_space(), length, self.config.discretization)

    def forget(self) -> None:
        """Drop what was kept; the next call makes it again."""
        self._kept = None

    def _state_space(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log_dt, log_decay, frequency and B C, as the op takes them, in float32 at least."""
        parts = (self.log_dt, self.log_decay, self.frequency, self.output_vector)
        log_dt, log_decay, frequency, c = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts)
        if self.input_vector is not None:
            (b_re, b_im), (c_re, c_im) = self.input_vector.to(c.dtype).unbind(-1), c.unbind(-1)
            c = torch.stack([b_re * c_re - b_im * c_im, b_re * c_im + b_im * c_re], dim=-1)
        if self.config.directions == "concat":  # twice the channels: one half looks back only, the other ahead only
            log_dt, log_decay, frequency = (torch.cat([p, p], dim=1) for p in (log_dt, log_decay, frequency))
            nothing = torch.zeros_like(c[0])
            c = torch.stack([torch.cat([c[0], nothing]), torch.cat([nothing, c[1]])])
        return log_dt, log_decay, frequency, c

    def _convolve(self, u: Tensor) -> Tensor:
        impl, skip = s4d.choice(u), F.pad(self.skip, (0, u.shape[1] - len(self.skip)))
        keep = impl in ("c", "fft") and not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        if not keep or s4d.refuses(impl, (u,)):
            return s4d(u, *self._state_space(), skip, discretization=self.config.discretization)
        if impl == "c":
            return convolve_c(u.mT, self._kept_spectrum(u.shape[2], lambda f, b: spectrum_c(f, b, skip), self.skip)).mT
        return convolve(u, self._kept_spectrum(u.shape[2], two_way_spectrum), skip)

    def _kept_spectrum(self, length: int, make: Callable[..., Tensor], *others: Tensor) -> Tensor:
        """`make(*kernels)`; `others` are what it takes from beside them."""
        parts = (self.log_dt, self.log_decay, self.frequency, self.input_vector, self.output_vector, *others)
        sources = [p for p in parts if p is not None]
        if any(p.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(p) for p in sources):
            return make(*self.kernels(length))  # tensors of which nobody counts the writes
        key = (length, *((p.data_ptr(), p._version, p.dtype, p.device) for p in sources))
        if self._kept is not None:
            known, copies, spectrum = self._kept
            if known == key and all(torch.equal(a, b) for a, b in zip(copies, sources, strict=False)):
                return spectrum
        spectrum = make(*self.kernels(length))
        copies = tuple(p.detach().clone() for p in sources if p.device.type == "cpu")
        self._kept = (key, copies, spectrum)
        return spectrum

    def _apply(self, *args: Any, **kwargs: Any) -> "BiSSM":
        self.forget()  # a move to another device or dtype
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_kept": None}


def _initial_state_space(init: Init, state_size: int) -> tuple[Tensor, Tensor]:
    """Imaginary parts of A, and B, in float64 for every other state of a conjugate pair. Source: arXiv:2206.11893."""
    n = torch.arange(state_size // 2, dtype=torch.float64, device="cpu")
    if init == "lin":
        return math.pi * n, torch.ones_like(n)
    if init == "inv":
        return state_size / math.pi * (state_size / (2 * n + 1) - 1), torch.ones_like(n)
    # HiPPO-LegS is normal but for a rank-one term; what is left is -1/2 plus a skew matrix with these eigenvalues.
    root = torch.sqrt(2 * torch.arange(state_size, dtype=torch.float64, device="cpu") + 1)
    outer = root[:, None] * root / 2
    skew = torch.triu(outer, 1) - torch.tril(outer, -1)
    frequency, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    # An eigenvector has any phase; the one that makes B positive does not depend on the library.
    return frequency[state_size // 2 :], (vectors.mH @ root.to(vectors.dtype)).abs()[state_size // 2 :]
