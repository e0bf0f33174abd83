"""State spaces keep float32 inside: phases of thousands of radians and sums over all tokens allow nothing less."""

from contextlib import AbstractContextManager, nullcontext

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products as they are written, also inside a caller's mixed precision."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
