"""What a kernel is told of the tensors of a step, and whether it still holds when the step comes again."""

from array import array
from operator import attrgetter

import torch
from torch import Tensor

from smalti.ops.adamw_ema.reference import PLAIN, Operands

_DTYPE, _DEVICE, _LAYOUT = attrgetter("dtype"), attrgetter("device"), attrgetter("layout")


class Table:
    """Sizes and addresses of tensors that a twin does not refuse.

    To ask some hundred tensors the same questions in every step takes as long as a million weights do, above all
    because the step itself has driven them out of the caches. So each is touched once a step, in `follow`.

    Args:
        operands: all but the gradients are held from now on, and with them the memory that addresses point to.
    """

    def __init__(self, operands: Operands) -> None:
        self.device = operands.weights[0].device
        self.count = len(operands.weights)
        self.sizes = array("q", [x.numel() for x in operands.weights])
        self.places = array("q", [x.data_ptr() for column in operands for x in column])
        self.changed = [x for name, column in zip(Operands._fields, operands, strict=True) for x in column
                        if name != "gradients"]  # fmt: skip
        self.steps = operands.steps
        self._gradients = operands.gradients
        self._held_sizes = self._sizes_now()

    def follow(self, gradients: list[Tensor]) -> bool:
        """Take the gradients of another step; False = they, or a tensor that is held, are not as they were.

        After False the table is of no use any more. Gradients are held until `release`.
        """
        n, places = self.count, list(map(Tensor.data_ptr, self.changed))
        if (
            places[:n] != self.places[:n].tolist()
            or places[n:] != self.places[2 * n :].tolist()
            or self._sizes_now() != self._held_sizes
            or not set(map(type, gradients)) <= PLAIN
            or set(map(_DTYPE, gradients)) != {torch.float32}
            or set(map(_DEVICE, gradients)) != {self.device}
            or set(map(_LAYOUT, gradients)) != {torch.strided}
            or not all(map(Tensor.is_contiguous, gradients))
            or list(map(Tensor.numel, gradients)) != self.sizes.tolist()
        ):
            return False
        self._gradients = gradients
        self.places[n : 2 * n] = array("q", map(Tensor.data_ptr, gradients))
        return True

    def release(self) -> None:
        """Let go of the gradients, which are to be freed as soon as nobody else needs them."""
        self._gradients = []

    def mark_changed(self) -> None:
        """Tell autograd, and caches of things made from weights, that all but the gradients are other numbers now.

        Before the kernel runs, because it drives the tensors' own records out of the processor's caches.
        """
        torch.autograd.graph.increment_version(self.changed)

    def _sizes_now(self) -> list[int]:
        """Of the tensors that are held: what may change where the address does not."""
        return list(map(Tensor.numel, self.changed)) if all(map(Tensor.is_contiguous, self.changed)) else []
