"""Multiply-adds and parameters, counted on the network itself, split into parts and kinds of work.

One multiply-add is one MAC of real numbers, or two floating-point operations; the papers print GMACs and call them
Gflops. docs/numbers.md says what counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from smalti.cost.trial import OpShapes, on_meta, try_forward, weights_on_meta
from smalti.models import Backbone, BackboneConfig, Fusable, build_backbone, config_of
from smalti.ops.dispatch import Op

# What the papers' tables count. Transforms, recurrences and kernels come on top and are shown beside.
PUBLISHED_KINDS = ("linear", "conv", "attention")


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of one forward pass of one image.

    Args:
        by_part: the same split by what does the work (embed, conditioning, modulation, mixer, mlp, head, ...), summed
            over all blocks.
        by_kind: the same split by the kind of work: "linear" and "conv" as PyTorch counts them, and what the ops count
            of themselves: "attention", "scan", "fft", "kernel", ... Both splits add up to `total`.
    """

    total: int
    by_part: dict[str, int]
    by_kind: dict[str, int]

    @property
    def published(self) -> int:
        """What the papers' tables count: matrix products, convolutions and attention."""
        return sum(self.by_kind.get(kind, 0) for kind in PUBLISHED_KINDS)

    def of_batch(self, images: int) -> int:
        """Of one forward of so many images: kernels depend on weights alone and are made once."""
        return self.total * images - self.by_kind.get("kernel", 0) * (images - 1)


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a network holds.

    Args:
        trained: those that training changes, the papers' count of most networks.
        total: with the frozen ones, as the position table of a DiT.
        fused: those of the inference form, frozen ones left out; as `trained` for a network that has no other form.
        by_part: `total` split as in `MacCount`.
    """

    trained: int
    total: int
    fused: int
    by_part: dict[str, int]


def count_macs(
    model: nn.Module | BackboneConfig,
    *,
    sample_size: tuple[int, int] | None = None,
    fused: bool = False,
    batch_size: int = 1,
) -> MacCount:
    """Multiply-adds of one forward of one image: matrix products, convolutions and ops, nothing elementwise.

    The network runs on the meta device, where a forward of any size costs no memory and every matrix product is seen.
    An op counts by its own rule (`Op.macs`), whatever implementation would run it, and not by the products inside.

    Args:
        model: a backbone, on any device, or the config of one. It is left as it is.
        sample_size: rows and columns of the latents; None = those that the network is made for.
        fused: count the inference form of a network that has one.
        batch_size: images in the batch. What is done once for all of them, as the kernels of state spaces and the
            merging of parallel convolutions, is shared out evenly.

    Raises:
        ValueError: the network refuses latents of this size.

    Source: counting rule of Peebles & Xie 2023, arXiv:2212.09748, table 4, confirmed by recount.
    """
    network = on_meta(model)
    config = config_of(network)
    if fused and isinstance(network, Fusable):
        network = network.fuse()
    flops, tracker = FlopCounterMode(display=False), ModuleTracker()
    ops = _OpCounter(flops, tracker)
    with torch.no_grad(), tracker, flops:
        try_forward(network, weights_on_meta(network), config, sample_size, ops, batch_size=batch_size)
    root = type(network).__name__
    counted = [*_products(flops, root), *((_inside(path, root), kind, n) for path, kind, n in ops.counted)]
    counted = [(path, kind, n // batch_size) for path, kind, n in counted]
    blocks = _block_paths(network)
    by_part = _sum((_part(network, path, blocks), n) for path, _, n in counted)
    by_kind = _sum((kind, n) for _, kind, n in counted)
    return MacCount(sum(by_kind.values()), by_part, by_kind)


def count_parameters(model: nn.Module | BackboneConfig) -> ParameterCount:
    """Trained, all and fused parameters of a backbone or of the one that a config describes; nothing is allocated."""
    network = on_meta(model)
    named = list(network.named_parameters())
    blocks = _block_paths(network)
    owners = ((*name.rpartition(".")[::2], parameter) for name, parameter in named)
    by_part = _sum((_part(network, owner, blocks) if owner else name, p.numel()) for owner, name, p in owners)
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    fused = trained
    if isinstance(network, Fusable):
        frozen = sum(p.numel() for _, p in named) - trained
        with torch.device("meta"):  # a built network is not copied just to be counted
            inference = cast(Fusable, build_backbone(config_of(network))).fuse()
        fused = sum(p.numel() for p in inference.parameters()) - frozen
    return ParameterCount(trained, sum(p.numel() for _, p in named), fused, by_part)


class _OpCounter:
    """Stands in for every op: notes what it counts of itself, and returns a result of the right shape.

    The matrix products in the reference, which tells that shape, are taken back from PyTorch's counter.
    """

    def __init__(self, flops: FlopCounterMode, tracker: ModuleTracker) -> None:
        self.counted: list[tuple[str, str, int]] = []  # path, kind, multiply-adds
        self._flops, self._tracker = flops, tracker
        self._shapes = OpShapes()

    def __call__(self, op: Op, args: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
        path = max(self._tracker.parents - {"Global"}, key=len)
        self.counted += [(path, kind, n) for kind, n in op.macs(*args).items()]
        before = {path: dict(counts) for path, counts in self._flops.flop_counts.items()}
        self._shapes.learn(op, args, options)
        self._flops.flop_counts.clear()
        for path, counts in before.items():
            self._flops.flop_counts[path].update(counts)
        return self._shapes.of(op, args, options)


def _products(flops: FlopCounterMode, root: str) -> list[tuple[str, str, int]]:
    """(path, kind, multiply-adds) of what PyTorch counts, each module without what the modules inside it did."""
    counts = {
        _inside(path, root): _sum((_kind(op), n // 2) for op, n in by_op.items())
        for path, by_op in flops.get_flop_counts().items()
        if path != "Global"
    }
    own = {path: dict(by_kind) for path, by_kind in counts.items()}
    for path, by_kind in counts.items():
        if path:
            for kind, n in by_kind.items():
                own[_caller(path, counts)][kind] -= n
    return [(path, kind, n) for path, by_kind in own.items() for kind, n in by_kind.items()]


def _kind(operator: object) -> str:
    name = str(operator)
    return "conv" if "conv" in name else "attention" if "attention" in name else "linear"


def _inside(path: str, root: str) -> str:
    return path.removeprefix(root).removeprefix(".")


def _caller(path: str, counted: Mapping[str, object]) -> str:
    """The nearest module around this one that ran; lists of modules hold others but never run."""
    while (path := path.rpartition(".")[0]) not in counted:
        pass
    return path


def _block_paths(network: nn.Module) -> set[str]:
    """Where the repeated blocks stand."""
    blocks = {id(block) for block in cast(Backbone, network).iter_blocks()}
    return {path for path, module in network.named_modules() if id(module) in blocks}


def _part(network: nn.Module, path: str, blocks: set[str]) -> str:
    """The attribute that a module belongs to; blocks are looked into, so that equal parts of blocks add up."""
    names = path.split(".") if path else []
    inside_block = max((i for i in range(1, len(names)) if ".".join(names[:i]) in blocks), default=0)
    module, listed = network.get_submodule(".".join(names[:inside_block])), "rest"
    for name in names[inside_block:]:
        child = module.get_submodule(name)
        if isinstance(child, nn.ModuleList):
            listed = name
        elif not isinstance(module, nn.ModuleList):
            return name
        module = child
    return listed


def _sum(items: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, count in items:
        sums[name] = sums.get(name, 0) + count
    return {name: count for name, count in sums.items() if count}
