"""Multiply-adds and parameters, counted on the network itself and split into parts.

One multiply-add is one MAC; the papers print GMACs and call them Gflops.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from smalti.models import BackboneConfig, build_backbone


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of one forward pass of one image.

    Args:
        by_part: the same split by what does the work (embed, conditioning, modulation, mixer, mlp, head, ...), summed
            over all blocks; the values add up to `total`.
    """

    total: int
    by_part: dict[str, int]

    @property
    def giga(self) -> float:
        """In 10^9, as the papers print it."""
        return self.total / 1e9


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a network holds.

    Args:
        trained: those that training changes, the papers' count.
        total: with the frozen ones, as the position table of a DiT.
        by_part: `total` split as in `MacCount`.
    """

    trained: int
    total: int
    by_part: dict[str, int]


def count_macs(model: nn.Module | BackboneConfig, *, sample_size: tuple[int, int] | None = None) -> MacCount:
    """Multiply-adds of one forward of one image: matrix products, convolutions and attention, nothing elementwise.

    The network runs on the meta device, where a forward of any size costs nothing, and where the counter sees both
    products of attention (on a CPU it does not look into the fused kernel).

    Args:
        model: a backbone, on any device, or the config of one. It is left as it is.
        sample_size: rows and columns of the latents; None = those that the network is made for.

    Raises:
        ValueError: the network refuses latents of this size.

    Source: counting rule of Peebles & Xie 2023, arXiv:2212.09748, table 4, confirmed by recount.
    """
    network = _on_meta(model)
    config: BackboneConfig = network.config  # type: ignore[assignment]
    rows, columns = config.sample_size if sample_size is None else sample_size
    latents = torch.empty(1, config.in_channels, rows, columns, device="meta")
    timesteps = torch.empty(1, device="meta")
    labels = torch.empty(1, dtype=torch.int64, device="meta") if config.num_classes else None
    weights = {name: t.detach().to("meta") for name, t in (*network.named_parameters(), *network.named_buffers())}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        functional_call(network, weights, (latents, timesteps, labels))
    root = type(network).__name__
    flops = {
        path.removeprefix(root).removeprefix("."): sum(counts.values())
        for path, counts in counter.get_flop_counts().items()
        if path != "Global"
    }
    own = dict(flops)  # without what the modules inside it did
    for path, count in flops.items():
        if path:
            own[_caller(path, flops)] -= count
    by_part = _sum_by_part((_part(network, path), count // 2) for path, count in own.items())
    return MacCount(counter.get_total_flops() // 2, by_part)


def count_parameters(model: nn.Module | BackboneConfig) -> ParameterCount:
    """Trained and all parameters of a backbone or of the one that a config describes; nothing is allocated."""
    network = _on_meta(model)
    named = list(network.named_parameters())
    owners = ((*name.rpartition(".")[::2], parameter) for name, parameter in named)
    by_part = _sum_by_part((_part(network, owner) if owner else name, p.numel()) for owner, name, p in owners)
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    return ParameterCount(trained, sum(p.numel() for _, p in named), by_part)


def _on_meta(model: nn.Module | BackboneConfig) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    with torch.device("meta"):
        return build_backbone(model)


def _caller(path: str, counted: dict[str, int]) -> str:
    """The nearest module around this one that ran; lists of modules hold others but never run."""
    while (path := path.rpartition(".")[0]) not in counted:
        pass
    return path


def _part(network: nn.Module, path: str) -> str:
    """The attribute that a module belongs to; lists of blocks are looked into, so that equal parts of blocks add up."""
    module, listed = network, "rest"
    for name in path.split(".") if path else ():
        child = module.get_submodule(name)
        if isinstance(child, nn.ModuleList):
            listed = name
        elif not isinstance(module, nn.ModuleList):
            return name
        module = child
    return listed


def _sum_by_part(items: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for part, count in items:
        sums[part] = sums.get(part, 0) + count
    return {part: count for part, count in sums.items() if count}
