"""What a training run holds whatever the batch: weights, gradients, moments, average; in memory and on the disk."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smalti.cost.plan_request import PlanRequest
from smalti.models import Backbone
from smalti.nn.plane import Pointwise
from smalti.storage.tensors import file_size

_FP32, _BF16 = 4, 2
# Modules whose weights autocast rounds at every use; training gathers them rounded.
ROUNDED = (nn.Linear, nn.Conv2d, Pointwise)


@dataclass(frozen=True)
class RankState:
    """Bytes that one process holds from step to step, and what it needs beside them for a moment.

    Args:
        weights: fp32, with frozen ones and buffers.
        gradients: fp32.
        moments: Adam's two, fp32.
        average: the moving average of the weights, fp32.
        gathered: fsdp and hsdp: whole weights for compute, of the block at work and of the next one (all of them
            without reshard).
        reduced: fsdp and hsdp: whole gradients of the largest block, before and while they are added up; of all blocks
            where they are kept whole over several micro-batches.
        optimizer: room that the update takes, none if it is fused.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    gathered: int = 0
    reduced: int = 0
    optimizer: int = 0

    @property
    def kept(self) -> int:
        """What stays from step to step."""
        return self.weights + self.moments + self.average

    @property
    def total(self) -> int:
        """With gradients: 20 bytes for each trained parameter where nothing is split."""
        return self.kept + self.gradients


@dataclass(frozen=True)
class StateMemory:
    """State of the process that holds most and of the one that holds least: rows do not always divide evenly."""

    most: RankState
    least: RankState


def state_memory(network: nn.Module, request: PlanRequest) -> StateMemory:
    """State by strategy, for AdamW with its average in float32.

    With P parameters, split over S: weights 4 P/S, gradients 4 P/S, moments 8 P/S, average 4 P/S; split tensor by
    tensor along the first dimension, as FSDP2 does. bf16 weights are gathered for two blocks at a time.

    Args:
        network: on any device, also without memory.
    """
    shards = request.shards
    ranks = [_rank_state(network, request, rank) for rank in {0, shards - 1}]
    ranks.sort(key=lambda state: state.total, reverse=True)
    return StateMemory(ranks[0], ranks[-1])


def _rank_state(network: nn.Module, request: PlanRequest, rank: int) -> RankState:
    shards = request.shards
    parameters = list(network.parameters())
    trained = [p for p in parameters if p.requires_grad]
    buffers = sum(b.nbytes for b in network.buffers())
    own_trained = _FP32 * sum(_part(p, shards, rank) for p in trained)
    own = _FP32 * sum(_part(p, shards, rank) for p in parameters) + buffers
    if shards == 1:
        return RankState(
            weights=own,
            gradients=own_trained,
            moments=2 * own_trained,
            average=own,
            optimizer=0 if request.fused_optimizer else own_trained,
        )
    groups = gathered_bytes(network, request.precision)
    # Without reshard, gradients of several micro-batches are added up before they are split.
    whole = request.micro_batches > 1 and not request.reshard
    reduced = _FP32 * _numbers(trained) if whole else 2 * groups.largest_gradient
    return RankState(
        weights=_FP32 * sum(_part(p, shards, 0) for p in parameters) + buffers,
        gradients=own_trained,
        moments=2 * own_trained,
        average=own,
        gathered=(2 * max(groups.blocks, default=0) if request.reshard else sum(groups.blocks)) + groups.rest,
        reduced=reduced,
        optimizer=0 if request.fused_optimizer else own_trained,
    )


def _part(tensor: Tensor, shards: int, rank: int) -> int:
    """Numbers of a tensor that a rank holds when its rows are dealt out in equal parts, the last ones short."""
    if shards == 1 or tensor.ndim == 0:
        return tensor.numel()
    rows = -(-len(tensor) // shards)
    return max(0, min(rows, len(tensor) - rank * rows)) * (tensor.numel() // max(1, len(tensor)))


@dataclass(frozen=True)
class Gathered:
    """Bytes of the whole weights of each repeated block, and of everything else, as fsdp gathers them.

    Args:
        largest_gradient: of the block with the most trained weights, in float32.
    """

    blocks: tuple[int, ...]
    rest: int
    largest_gradient: int

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest


def gathered_bytes(network: nn.Module, precision: str) -> Gathered:
    """What travels where weights are split: those of products in the precision of products, all others in float32."""
    rounded = {
        id(p) for module in network.modules() if isinstance(module, ROUNDED) for p in module.parameters(recurse=False)
    }

    def size(parameter: Tensor) -> int:
        return parameter.numel() * (_BF16 if precision == "bf16" and id(parameter) in rounded else _FP32)

    backbone: Backbone = network  # type: ignore[assignment]
    blocks = [list(block.parameters()) for block in backbone.iter_blocks()]
    sizes = tuple(sum(map(size, block)) for block in blocks)
    gradients = [_FP32 * _numbers(p for p in block if p.requires_grad) for block in blocks]
    return Gathered(sizes, sum(map(size, network.parameters())) - sum(sizes), max(gradients, default=0))


def _numbers(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def checkpoint_bytes(network: nn.Module) -> dict[str, int]:
    """Bytes of a stored run by group: weights, average, and Adam's moments with their step counters; 16 per parameter.

    Args:
        network: on any device, also without memory.
    """
    weights = {name: torch.empty_like(t, device="meta") for name, t in network.state_dict().items()}
    return {"model": file_size(weights), "ema": file_size(weights), "optimizer": file_size(_moments(network))}


def _moments(network: nn.Module) -> Mapping[str, Tensor]:
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{moment}"] = torch.empty_like(parameter, device="meta")
            found[f"{name}.step"] = torch.empty((), device="meta")
    return found
