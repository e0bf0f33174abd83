"""Ops that stay one node in compiled code, so that the compiler calls the twin in C instead of writing its own."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from smalti.ops import dispatch


@contextmanager
def keep_whole(*names: str) -> Iterator[None]:
    """What is compiled while the `with` lasts calls these ops as they are; for inference, there are no gradients."""
    before, dispatch.whole = dispatch.whole, frozenset(names)
    try:
        yield
    finally:
        dispatch.whole = before


@torch.library.custom_op("smalti::whole", mutates_args=(), schema="(str name, Tensor[] inputs, str options) -> Tensor")
def _whole(name: str, inputs: list[Tensor], options: str) -> Tensor:
    y = _op(name)(*inputs, **ast.literal_eval(options))
    room = _room(y, inputs)
    return y if y.stride() == room.stride() else room.copy_(y)


@_whole.register_fake
def _(name: str, inputs: list[Tensor], options: str) -> Tensor:
    return _room(_op(name).reference(*inputs, **ast.literal_eval(options)), inputs)


def _op(name: str) -> dispatch.Op:
    from smalti.ops import OPS  # here, because the table imports every op

    return OPS[name]


def _room(y: Tensor, inputs: list[Tensor]) -> Tensor:
    """Memory as the compiler is promised it: in the order of the first input where the shapes agree, else plain."""
    if y.shape == inputs[0].shape:
        return torch.empty_like(inputs[0], dtype=y.dtype)
    return torch.empty_like(y, memory_format=torch.contiguous_format)
