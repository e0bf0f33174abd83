"""Feature networks compute in whole float32, which is what their identity says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def whole_float32() -> Iterator[None]:
    """Products and convolutions keep all bits of float32 inside, whatever the process has set, and again after it.

    Out of the box, CUDA convolutions compute in TF32, which has 10 bits of mantissa. The settings are the process's:
    other threads that compute meanwhile are slower and more exact.
    """
    # There is one setting for all products from before torch 2.9, and one for each kind since. Torch stops where the
    # two disagree, and reading the old one may already be such a place.
    backends: Any = torch.backends
    rules = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [rule.fp32_precision for rule in rules]
    try:
        all_before = torch.get_float32_matmul_precision()
    except RuntimeError:
        all_before = None
    if all_before is not None:
        torch.set_float32_matmul_precision("highest")
    for rule in rules:
        rule.fp32_precision = "ieee"
    try:
        yield
    finally:
        if all_before is not None:
            torch.set_float32_matmul_precision(all_before)
        for rule, precision in zip(rules, before, strict=True):
            rule.fp32_precision = precision
