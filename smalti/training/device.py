"""Where a run computes, and in which precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from smalti.errors import ConfigError
from smalti.ops.float32 import tensor_float_32, whole_float32


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N, mps") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise ConfigError(f"device {name!r} is not available on this machine; use --device auto")
    return device


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What the matrix products of a run compute in, where that is not the dtype of the weights."""
    return torch.bfloat16 if precision == "bf16" else None


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a network runs at this precision; weights stay float32."""
    dtype = autocast_dtype(precision)
    return products(device, precision) if dtype is None else torch.autocast(device.type, dtype)


def products(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context of products and convolutions in float32, backward passes too: on CUDA whole, or in TF32 where that is
    the precision. On other devices they are as the process has them, which is whole unless somebody changed it.
    """
    if device.type != "cuda":
        return nullcontext()
    return {"fp32": whole_float32, "tf32": tensor_float_32}.get(precision, nullcontext)()
