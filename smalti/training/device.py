"""Where a run computes, and in which precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from smalti.errors import ConfigError


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
    """The context of products in float32, backward passes too: TF32 on CUDA where that is the precision.

    Without it they are as the process has them, which is in whole float32 unless somebody changed it.
    """
    return tensor_float_32() if precision == "tf32" and device.type == "cuda" else nullcontext()


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Matrix products of float32 on CUDA round their factors to 10 bits of mantissa; afterwards all is as before.

    The setting is the process's: other threads that compute meanwhile have it too.
    """
    # One setting is from before torch 2.9, and one for each kind of product since. Torch stops where the two disagree.
    rules = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [rule.fp32_precision for rule in rules]
    try:
        all_before = torch.get_float32_matmul_precision()
    except RuntimeError:
        all_before = None
    if all_before is not None:
        torch.set_float32_matmul_precision("high")
    rules[0].fp32_precision = "tf32"
    try:
        yield
    finally:
        if all_before is not None:
            torch.set_float32_matmul_precision(all_before)
        for rule, precision in zip(rules, before, strict=True):
            rule.fp32_precision = precision
