"""Twin for CUDA: one Triton launch for all tensors of a group.

Nothing here imports triton before the first launch. Has run under Triton's interpreter only: see docs/gpu.md.
"""

import math
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from smalti.ops.adamw_ema.reference import Operands, Rates, layout_refusal
from smalti.ops.adamw_ema.table import Table

INSTALLED = find_spec("triton") is not None
PIECE = 16384  # elements of a program
BLOCK = 2048  # elements that a program holds at a time


def triton_refusal(operands: Operands) -> str:
    """Why the kernel cannot take these tensors; "" = it can."""
    if torch.compiler.is_compiling():
        return "a compiler cannot see what it changes"
    if not INSTALLED:
        return "triton, which compiles its kernel for CUDA, is not installed: pip install triton"
    return layout_refusal(operands)


def adamw_ema_triton(table: Table, rates: Rates) -> None:
    """One step of all tensors; the bits may differ from PyTorch's in the last place, and are the same in every run."""
    from smalti.ops.adamw_ema import triton_kernels

    device = table.device
    table.mark_changed()
    torch._foreach_add_(table.steps, 1)
    owners, pieces, sizes = _tables(tuple(table.sizes), device)
    if not len(owners):
        return
    # The counters at the end are read one by one.
    aligned = all(place % 16 == 0 for place in table.places[: -table.count])
    beta1, beta2 = rates.betas
    numbers = [
        rates.learning_rate,
        _log(beta1),
        _log(beta2),
        1 - beta1,
        1 - beta2,
        beta2,
        rates.epsilon,
        1 - rates.learning_rate * rates.weight_decay,
        rates.average,
    ]
    triton_kernels.update[(len(owners),)](
        _moved(torch.tensor(table.places, dtype=torch.int64), device), sizes, owners, pieces,
        _moved(torch.tensor(numbers, dtype=torch.float64), device), len(sizes),
        PIECE=PIECE, BLOCK=BLOCK, ALIGNED=aligned, num_warps=8,
    )  # fmt: skip


@lru_cache(maxsize=8)
def _tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each program its tensor and the number of its piece; and the sizes. The same in every step of a run."""
    counts = torch.tensor([-(-size // PIECE) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    pieces = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    return owners.int().to(device), pieces.int().to(device), torch.tensor(sizes, dtype=torch.int64).to(device)


def _moved(table: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the GPU, which a copy from ordinary memory does."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
