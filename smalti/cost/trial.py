"""A forward pass that costs nothing: on the meta device, with every op replaced by a result of the right shape."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smalti.models import BackboneConfig, build_backbone
from smalti.ops.dispatch import Op, watch


def on_meta(model: nn.Module | BackboneConfig) -> nn.Module:
    """The network itself, or the one that a config describes, without memory for its weights."""
    if isinstance(model, nn.Module):
        return model
    with torch.device("meta"):
        return build_backbone(model)


def weights_on_meta(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as `try_forward` takes them; trained ones ask for gradients."""
    parameters = {n: p.detach().to("meta").requires_grad_(p.requires_grad) for n, p in network.named_parameters()}
    return parameters | {name: buffer.detach().to("meta") for name, buffer in network.named_buffers()}


def try_forward(
    network: nn.Module,
    weights: dict[str, Tensor],
    config: BackboneConfig,
    sample_size: tuple[int, int] | None,
    watcher: Callable[[Op, tuple[Tensor, ...], dict[str, Any]], Tensor],
    *,
    batch_size: int = 1,
) -> Tensor:
    """Images of `sample_size` (None = that of the config) through the network, ops going to `watcher`.

    Raises:
        ValueError: the network refuses latents of this size.
    """
    rows, columns = config.sample_size if sample_size is None else sample_size
    with torch.device("meta"), watch(watcher):
        latents, timesteps = torch.empty(batch_size, config.in_channels, rows, columns), torch.empty(batch_size)
        labels = torch.empty(batch_size, dtype=torch.int64) if config.num_classes else None
        return functional_call(network, weights, (latents, timesteps, labels))


class OpShapes:
    """What an op would return, without numbers; the reference tells, run once for each kind of call."""

    def __init__(self) -> None:
        self._known: dict[Any, Tensor] = {}

    def learn(self, op: Op, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        """Run the reference unless a call like this was seen before; afterwards `of` runs nothing."""
        key = self._key(op, args, options)
        if key not in self._known:
            with watch(None), torch.no_grad():
                self._known[key] = op.reference(*args, **options)

    def of(self, op: Op, args: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
        self.learn(op, args, options)
        return torch.empty_like(self._known[self._key(op, args, options)])

    def _key(self, op: Op, args: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        return op.name, tuple((a.shape, a.stride(), a.dtype) for a in args), repr(options)
