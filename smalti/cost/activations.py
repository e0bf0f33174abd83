"""Memory of activations, counted on the meta device: what a forward holds at once, what a training step keeps."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smalti.cost.trial import OpShapes, on_meta, try_forward, weights_on_meta
from smalti.models import BackboneConfig, config_of
from smalti.ops.dispatch import Op


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one image in float32, weights left out, run eagerly, without what an op needs inside itself.

    Args:
        forward: the most that is alive at once in a forward without gradients.
        training: what the forward keeps for the backward pass; an op is taken to keep its inputs and its output.
    """

    forward: int
    training: int


def count_activations(
    model: nn.Module | BackboneConfig, *, sample_size: tuple[int, int] | None = None
) -> ActivationBytes:
    """Activations of one image at any size, without the memory for them.

    Args:
        model: as for `count_macs`, and like there left as it is.
        sample_size: rows and columns of the latents; None = those that the network is made for.

    Raises:
        ValueError: the network refuses latents of this size.
    """
    network = on_meta(model)
    config, weights, shapes = config_of(network), weights_on_meta(network), OpShapes()
    alive = _Alive(shapes)
    with torch.no_grad(), alive:
        try_forward(network, weights, config, sample_size, alive.run_op)
    with torch.enable_grad(), _kept(weights) as kept:
        try_forward(network, weights, config, sample_size, _connected(shapes))
        training = sum(kept.values())
    return ActivationBytes(alive.peak, training)


class _Alive(TorchDispatchMode):
    """Adds up the storages that live at the same time."""

    def __init__(self, shapes: OpShapes) -> None:
        super().__init__()
        self.peak, self._now, self._looks_away = 0, 0, False
        self._known: set[int] = set()
        self._shapes = shapes

    def run_op(self, op: Op, args: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
        self._looks_away = True  # what the reference needs says nothing about the twins that run
        self._shapes.learn(op, args, options)
        self._looks_away = False
        return self._shapes.of(op, args, options)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._looks_away:
            return result
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known | given:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        self._known.add(name)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._remove, name, size)

    def _remove(self, name: int, size: int) -> None:
        self._known.discard(name)
        self._now -= size


class _KeepsAll(torch.autograd.Function):
    """Stands for an op whose backward needs its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *args: Tensor) -> Tensor:
        ctx.save_for_backward(*args, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("a trial forward has no backward")


def _connected(shapes: OpShapes) -> Any:
    def run(op: Op, args: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
        return _KeepsAll.apply(shapes.of(op, args, options), *args)

    return run


@contextmanager
def _kept(weights: dict[str, Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every storage, other than weights, that autograd saves."""
    ours = {tensor.untyped_storage()._cdata for tensor in weights.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in ours:
            kept[storage._cdata] = storage.nbytes()
        return tensor  # holding it keeps its storage, and so the key, unique

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
