"""What the processes of a run tell each other in one step, in bytes and in seconds."""

from dataclasses import dataclass

from torch import nn

from smalti.cost.plan_devices import DeviceKind
from smalti.cost.plan_request import PlanRequest
from smalti.cost.plan_state import gathered_bytes

_FP32 = 4


@dataclass(frozen=True)
class Communication:
    """One optimizer step, one device, one way.

    Args:
        inside: bytes that it sends to devices of its node.
        between: bytes that it sends to other nodes.
        seconds: of both at the rates of the links; they run at the same time where a ring goes through both.
    """

    inside: int
    between: int
    seconds: float


def communication(network: nn.Module, request: PlanRequest, device: DeviceKind) -> Communication:
    """Bytes by ring algorithms, which send the least that is possible.

    With P parameters, all trained, N processes, shards of S processes and R = N / S copies:

    ddp: gradients are added up once a step: 2 (N-1)/N 4P.
    fsdp: weights are gathered before each forward and again before each backward, gradients scattered after it, for
        every micro-batch: (N-1)/N (2P + 2P + 4P) in bf16, (N-1)/N (4P + 4P + 4P) in fp32. Without reshard weights are
        gathered once for both, and gradients scattered once a step.
    hsdp: as fsdp among S, and then 2 (R-1)/R 4P/S among the copies.

    A ring over several nodes crosses each border once, and as many rings run as a node has devices: of what a device
    sends, one part in that many leaves the node.
    """
    trained = _FP32 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    ranks, shards, per_node = request.ranks, request.shards, request.gpus_per_node
    if request.strategy in ("single", "ddp"):
        return _timed(*_ring(2 * (ranks - 1) / ranks * trained, ranks, per_node), device)
    gathers = gathered_bytes(network, request.precision).total * (2 if request.reshard else 1) * request.micro_batches
    # Without reshard, gradients are added up whole and exchanged once.
    scatters = trained * (request.micro_batches if request.reshard else 1)
    whole = (shards - 1) / shards * (gathers + scatters)
    inside, between = _ring(whole, shards, per_node)
    copies = ranks // shards
    across = 2 * (copies - 1) / copies * trained / shards * (request.micro_batches if request.reshard else 1)
    if copies > 1:
        if shards >= per_node:
            between += round(across)
        else:  # several copies in one node: their rings go through both
            more_inside, more_between = _ring(across, copies, per_node // shards)
            inside, between = inside + more_inside, between + more_between
    return _timed(inside, between, device)


def _ring(sent: float, members: int, per_node: int) -> tuple[int, int]:
    """What of a device's bytes stays inside its node and what leaves it."""
    if members <= per_node:
        return round(sent), 0
    return round(sent), round(sent / per_node)


def _timed(inside: int, between: int, device: DeviceKind) -> Communication:
    return Communication(inside, between, max(inside / device.inside_rate, between / device.between_rate))
