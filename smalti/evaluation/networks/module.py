"""Any `nn.Module` as a feature network: what comes before it and what is checked of what comes out of it."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.config import did_you_mean
from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import KINDS, NetworkIdentity
from smalti.ops.float32 import whole_float32
from smalti.storage.tensors import tensors_digest

Resize = Literal["bicubic", "bilinear"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
# Numbers made with these features carry the papers' own names (FID, sFID), so no other network may have the name.
_RESERVED = "inception"


class ModuleNetwork:
    """A feature network from a module that maps float images (B, 3, size, size) to features (B, width).

    The module is copied, and the copy put in evaluation mode and in float32; the module itself stays as it is. The
    weights' hash knows nothing of what its code does: when the code changes, change the name.

    Args:
        module: returns one tensor, or a tuple or mapping with one for each of `kinds`; in a tuple in that order.
        name: appears in the names of numbers: FD-mine. `inception` is taken.
        size: pixels of a side that it wants to see.
        mean, std: images with values in [0, 1] get `(images - mean) / std`; one number, or one a channel.
        resize: how images come to that size; antialiased where they shrink, and clipped to what 8 bits can hold.
        kinds: which features it makes: `pool`, `spatial`, `logits`.
        weights: SHA-256 for the identity; None = of the module's parameters and buffers.

    Raises:
        ConfigError: a setting makes no sense, or the module does not do what it should on two images of noise.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        size: int,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        resize: Resize = "bicubic",
        kinds: Sequence[str] = ("pool",),
        device: str = "cpu",
        weights: str | None = None,
    ) -> None:
        _check_name(name)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}: size is {size!r}; give the pixels of a side, a whole number from 1")
        if resize not in get_args(Resize):
            raise ConfigError(f"{name}: there is no resize {resize!r}{did_you_mean(str(resize), get_args(Resize))}")
        self._name, self._size, self._resize, self._kinds = name, size, resize, _checked_kinds(name, kinds)
        means, stds = _three(name, "mean", mean), _three(name, "std", std)
        if min(stds) <= 0:
            raise ConfigError(f"{name}: std is {std!r}; it divides, so it must be positive")
        self._device = _checked_device(name, device)
        self._module = _copied(module, name).requires_grad_(False).eval().float().to(self._device)
        self._mean = 255 * torch.tensor(means, dtype=torch.float64)[:, None, None]
        self._std = 255 * torch.tensor(stds, dtype=torch.float64)[:, None, None]
        self.identity = NetworkIdentity(
            name,
            tensors_digest(_tensors(module)) if weights is None else weights,
            f"{size}, {resize}{' (a = -0.5)' if resize == 'bicubic' else ''}, antialiased, clipped, not rounded; "
            f"then (x - {_shown(self._mean)}) / {_shown(self._std)}",
            f"float32 on {self._device.type}",
        )
        self._mean = self._mean.to(self._device, torch.float32)
        self._std = self._std.to(self._device, torch.float32)
        self.widths: Mapping[str, int] = self._probed()

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """float32 (B, width) on the CPU for each kind, of uint8 images (B, 3, H, W) of any size.

        Raises:
            DataError: these are no such images.
            ConfigError: the module returned something else than it did at first.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(f"expected 8-bit RGB images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        # Whatever precision the caller has chosen for training, features are made in the one that the identity names.
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False), whole_float32():
            found = self._checked(self._module(self._prepared(images)), len(images))
        # Cloned outside, because what is made in inference mode stays marked as such.
        found = {kind: rows.clone() for kind, rows in found.items()}
        if (widths := {kind: rows.shape[1] for kind, rows in found.items()}) != getattr(self, "widths", widths):
            raise ConfigError(f"{self._name}: the widths of its features were {self.widths}, and now are {widths}")
        return found

    def _prepared(self, images: Tensor) -> Tensor:
        x = images.to(self._device).float()
        if x.shape[2:] != (self._size, self._size):
            side = (self._size, self._size)
            x = F.interpolate(x, size=side, mode=self._resize, align_corners=False, antialias=True).clamp_(0, 255)
        return (x - self._mean) / self._std

    def _probed(self) -> dict[str, int]:
        """The widths, from a first look at noise."""
        noise = torch.randint(0, 256, (2, 3, self._size, self._size), generator=torch.Generator().manual_seed(0))
        try:
            found = self(noise.to(torch.uint8))
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{self._name}: the module cannot take float images (2, 3, {self._size}, {self._size}): "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
        for kind, rows in found.items():
            if not bool(torch.isfinite(rows).all()):
                raise ConfigError(f"{self._name}: the {kind} features of noise are not finite; its weights are damaged")
        return {kind: rows.shape[1] for kind, rows in found.items()}

    def _checked(self, found: Any, count: int) -> dict[str, Tensor]:
        """By kind, as float32 on the CPU."""
        if isinstance(found, Tensor):
            found = (found,)
        if isinstance(found, Mapping):
            if missing := [kind for kind in self._kinds if kind not in found]:
                have = ", ".join(map(str, found)) or "nothing"
                raise ConfigError(f"{self._name}: the module returned {have}, not {', '.join(missing)}")
            found = tuple(found[kind] for kind in self._kinds)
        if not isinstance(found, (tuple, list)) or len(found) != len(self._kinds):
            what = f"{len(found)} things" if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
            raise ConfigError(f"{self._name}: the module returned {what}; expected one tensor each for {self._kinds}")
        rows = dict(zip(self._kinds, found, strict=True))
        for kind, value in rows.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                what = str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ConfigError(f"{self._name}: {kind} is {what}; expected a tensor of floating-point numbers")
            if value.ndim != 2 or len(value) != count or not value.shape[1]:
                raise ConfigError(
                    f"{self._name}: {kind} of {count} images is {tuple(value.shape)}; expected ({count}, width), one "
                    "row an image: flatten or average what is left of height and width"
                )
        return {kind: value.to("cpu", torch.float32) for kind, value in rows.items()}


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"a feature network cannot be called {name!r}; use letters, digits and . _ + -, at most 64")
    if name.lower() == _RESERVED:
        raise ConfigError(f"the name {name} belongs to the network that defines FID; call yours something else")


def _checked_kinds(name: str, kinds: Sequence[str]) -> tuple[str, ...]:
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds or len(set(kinds)) < len(kinds):
        raise ConfigError(f"{name}: kinds are {kinds}; give one or more of {', '.join(KINDS)}, each once")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"{name}: there is no kind of features {kind!r}{did_you_mean(str(kind), KINDS)}")
    return kinds


def _checked_device(name: str, device: str) -> torch.device:
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch says the second where it was built without CUDA
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: cannot compute on the device {device!r} ({reason}); give cpu or cuda") from error


def _three(name: str, what: str, value: float | Sequence[float]) -> tuple[float, ...]:
    numbers = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
    if len(numbers) != 3 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers):
        raise ConfigError(f"{name}: {what} is {value!r}; give one finite number, or three for red, green and blue")
    return tuple(map(float, numbers))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those left out of checkpoints too: they change features just as well."""
    tensors = {name: p.detach() for name, p in module.named_parameters()} | dict(module.named_buffers())
    return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in tensors.items()}


def _copied(module: nn.Module, name: str) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name}: expected an nn.Module, got a {type(module).__name__}")
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:  # tensors with a history, open files and the like
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: the module cannot be copied ({reason}); give one that can") from error


def _shown(values: Tensor) -> str:
    numbers = [f"{v:g}" for v in values.flatten().tolist()]
    return numbers[0] if len(set(numbers)) == 1 else f"({', '.join(numbers)})"
