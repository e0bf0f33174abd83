"""For twins that hand addresses to C: which tensors have one, and gradients of gradients, which C does not give."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Element types as the C sources number them.
KINDS = {torch.float32: 0, torch.bfloat16: 1}

_pretending = False


@contextmanager
def pretend() -> Iterator[None]:
    """Twins in C also take tensors without numbers (`FakeTensorMode`) while the `with` lasts, and compute nothing then.

    For those who follow memory: the same tensors come and go as in a real run on this machine.
    """
    global _pretending
    before, _pretending = _pretending, True
    try:
        yield
    finally:
        _pretending = before


def pretends(*tensors: object) -> bool:
    """Whether these tensors are to be taken by twins in C and hold nothing that C could read."""
    return _pretending and any(isinstance(x, Tensor) and not _in_memory(x) for x in tensors)


def _in_memory(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter)


def refuses_memory(*tensors: Tensor) -> str:
    """Why C cannot read these tensors; "" when it can."""
    if torch.compiler.is_compiling():
        return "the compiler fuses the plain form by itself"
    for x in tensors:
        if x.device.type != "cpu":
            return f"it is for CPUs, got {x.device.type}"
        if x.dtype not in KINDS:
            return f"it takes {', '.join(str(dtype) for dtype in KINDS)}, got {x.dtype}"
        if not _pretending and not _in_memory(x):
            return f"it reads memory, which a {type(x).__name__} may not have"
    if torch._C._are_functorch_transforms_active():
        return "torch.func needs a form that it can transform"
    return ""


def lower_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives the output of a product; without autocast that of x."""
    if x.dtype is torch.float32 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        return dtype if dtype in KINDS else x.dtype
    return x.dtype


def plain_gradients(
    plain: Callable[..., Tensor], inputs: tuple[Tensor, ...], above: Tensor, *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of the plain form, where the twin has none of its own."""
    with torch.enable_grad():
        # Views, because one input may have been made from another: only what lies between them and the output counts.
        sources = tuple(x.view_as(x) if create_graph else x.detach().requires_grad_(x.requires_grad) for x in inputs)
        y = plain(*sources)
        wanted = [x for x in sources if x.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, above.to(y.dtype), create_graph=create_graph))
    return tuple(next(found) if x.requires_grad else None for x in sources)
