"""AdamW and the moving average of the weights in one pass over the bytes.

No `Op`, because it is no function: it changes tensors in place and nobody asks for its gradient. Like one it has a pure
definition, twins that are tested against it, and a reason where a twin refuses. What an optimizer, an average and a
network are is known to `smalti.training.fused_update` alone.
"""

from smalti.ops.adamw_ema.c import adamw_ema_c, c_refusal
from smalti.ops.adamw_ema.reference import Operands, Rates, adamw_ema_reference
from smalti.ops.adamw_ema.table import Table
from smalti.ops.adamw_ema.triton import adamw_ema_triton, triton_refusal

__all__ = ["Operands", "Rates", "Table", "adamw_ema", "adamw_ema_reference", "refuses"]


def refuses(operands: Operands) -> str:
    """Why no twin can take these tensors; "" = one can."""
    if not operands.weights:
        return ""
    return triton_refusal(operands) if operands.weights[0].device.type == "cuda" else c_refusal(operands)


def adamw_ema(operands: Operands | Table, rates: Rates) -> None:
    """Change weights, moments, averages and counters in place, as `adamw_ema_reference` says.

    Ask `refuses` first, or the table of a step that comes again: a twin hands addresses to a kernel, unchecked.

    Raises:
        MemoryError: there was none for the table of tensors; no number was changed.
    """
    if isinstance(operands, Operands):
        if not operands.weights:
            return
        operands = Table(operands)
    (adamw_ema_triton if operands.device.type == "cuda" else adamw_ema_c)(operands, rates)
