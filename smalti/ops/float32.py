"""What float32 means inside matrix products and convolutions: settings of the process, for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch


@contextmanager
def whole_float32() -> Iterator[None]:
    """Products and convolutions keep all bits of float32 inside, whatever the process has set, and again after it.

    Out of the box, CUDA convolutions compute in TF32, which has 10 bits of mantissa. The settings are the process's:
    other threads that compute meanwhile are slower and more exact.
    """
    with _inside("highest", "ieee", everywhere=True):
        yield


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """On CUDA, products and convolutions of float32 round their factors to 10 bits of mantissa, and as before after it.

    Other devices compute as they would. The settings are the process's, as those of `whole_float32`.
    """
    with _inside("high", "tf32", everywhere=False):
        yield


@contextmanager
def _inside(old: Literal["highest", "high"], new: str, *, everywhere: bool) -> Iterator[None]:
    # There is one setting for all products from before torch 2.9, and one for each kind since. Torch stops where the
    # two disagree, and reading the old one may already be such a place.
    backends: Any = torch.backends
    on_cuda, elsewhere = (
        (backends.cudnn.conv, backends.cuda.matmul),
        (backends.mkldnn.conv, backends.mkldnn.matmul),
    )
    rules = (*on_cuda, *elsewhere)
    before = [rule.fp32_precision for rule in rules]
    try:
        all_before = torch.get_float32_matmul_precision()
    except RuntimeError:
        all_before = None
    if all_before is not None:
        torch.set_float32_matmul_precision(old)
    for rule in rules if everywhere else on_cuda:
        rule.fp32_precision = new
    try:
        yield
    finally:
        if all_before is not None:
            torch.set_float32_matmul_precision(all_before)
        for rule, precision in zip(rules, before, strict=True):
            rule.fp32_precision = precision
