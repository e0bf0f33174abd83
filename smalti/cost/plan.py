"""What a training run needs before anybody starts it: operations, memory, disk, communication, hours.

Counts are exact: parameters, multiply-adds, bytes of state and of checkpoints. Memory of activations is followed tensor
by tensor without having it. Time is a band, because nobody knows a run's utilisation before it ran; one measured run
narrows it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from smalti.cost.clock import gemm_rate
from smalti.cost.macs import MacCount, ParameterCount, count_macs, count_parameters
from smalti.cost.plan_communication import Communication, communication
from smalti.cost.plan_devices import GIB, DeviceKind, find_device, machine_memory
from smalti.cost.plan_fit import Fit, find_fit
from smalti.cost.plan_request import CheckpointPolicy, Measured, PlanRequest
from smalti.cost.plan_state import StateMemory, checkpoint_bytes, state_memory
from smalti.cost.plan_step import ApplyPolicy, StepMemory
from smalti.cost.plan_time import Pace, SampleCost, SaveInterval, pace, sampling_cost, save_interval
from smalti.cost.trial import on_meta
from smalti.errors import ConfigError

TRAINING_FORWARDS = 3  # the backward pass has two products for each one of the forward
MEASURED_SPREAD = 0.1  # to both sides of one reading, where nothing tells how readings scatter


@dataclass(frozen=True)
class Operations:
    """Floating-point operations; one multiply-add is two.

    Args:
        forward: of one image.
        train: of one image, forward and backward, with what is computed again under activation checkpointing.
        again: the part of `train` that is computed again.
        step, run: of a whole optimizer step, and of all steps, on all devices.
    """

    forward: int
    train: int
    again: int
    step: int
    run: int


@dataclass(frozen=True)
class Stored:
    """One checkpoint.

    Args:
        bytes: of all files of tensors. by_group: the same split.
        write_seconds: at the rate asked about, all of it.
        copy_seconds: until an asynchronous save lets training go on, at the rate asked about.
        waiting, background: how often to save if training waits for the disk, and if it only waits for the copy.
    """

    bytes: int
    by_group: dict[str, int]
    write_seconds: float
    copy_seconds: float
    waiting: SaveInterval
    background: SaveInterval


@dataclass(frozen=True)
class Plan:
    """Answers to a `PlanRequest`.

    Args:
        device: with the rates and the memory that were used.
        macs: multiply-adds of one forward pass of one image, in the form that is trained.
        memory: of activations and gradients in one micro-batch.
        fit: whether it fits the device, and what would.
        paces, sampling: one entry for each utilisation, lowest first.
        calibration: "assumed", or "measured on ..." with the run that told.
        notes: what the reader should know about the numbers.
    """

    request: PlanRequest
    device: DeviceKind
    parameters: ParameterCount
    macs: MacCount
    operations: Operations
    state: StateMemory
    memory: StepMemory
    fit: Fit
    stored: Stored
    communication: Communication
    paces: tuple[Pace, ...]
    sampling: tuple[SampleCost, ...]
    calibration: str
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The plan as text, for people."""
        from smalti.cost.plan_text import plan_lines  # it needs this class

        return plan_lines(self)


def plan(request: PlanRequest, *, apply_policy: ApplyPolicy | None = None) -> Plan:
    """Work it all out; nothing is allocated, and nothing is timed but the matrix products of a plan for this CPU.

    Args:
        apply_policy: how training puts activation checkpointing into a network; without it only a plan that fits, and
            asks for none, can be made.

    Raises:
        ConfigError: the request and the measured run do not go together.
        ValueError: the network refuses its own size.
    """
    device = settle_device(request)
    network = on_meta(request.network)
    macs = count_macs(network, batch_size=request.images_at_once)
    operations = count_operations(macs, request)
    state = state_memory(network, request)
    memory, fit = find_fit(request, device, network, apply_policy)
    told = communication(network, request, device)
    utilisation, calibration, notes = _utilisation(request, device)
    drawn = 2 * count_macs(network, fused=True).total
    return Plan(
        request=request,
        device=device,
        parameters=count_parameters(network),
        macs=macs,
        operations=operations,
        state=state,
        memory=memory,
        fit=fit,
        stored=_stored(checkpoint_bytes(network), request),
        communication=told,
        paces=tuple(pace(request, device, share, operations.step, told) for share in utilisation),
        sampling=tuple(sampling_cost(request, device, share, drawn) for share in utilisation),
        calibration=calibration,
        notes=tuple(notes),
    )


def settle_device(request: PlanRequest) -> DeviceKind:
    """The kind of device with what the request says of it, and measured where the table has nothing."""
    device = find_device(request.device)
    changes: dict[str, float | int] = {}
    rate = f"{request.precision}_flops"
    if request.peak_tflops is not None:
        changes[rate] = request.peak_tflops * 1e12
    elif not device.peak(request.precision):
        changes[rate] = measured_peak(request.precision)
    if request.memory_gib is not None:
        changes["memory"] = round(request.memory_gib * GIB)
    elif not device.memory:
        changes["memory"] = machine_memory() // request.gpus_per_node
    if request.inside_gb_per_second is not None:
        changes["inside_rate"] = request.inside_gb_per_second * 1e9
    if request.between_gb_per_second is not None:
        changes["between_rate"] = request.between_gb_per_second * 1e9
    return dataclasses.replace(device, **changes)  # type: ignore[arg-type]


def measured_peak(precision: Literal["fp32", "tf32", "bf16"]) -> float:
    """Operations per second of a large matrix product on this CPU, with the threads that torch has now."""
    return 2 * gemm_rate(torch.bfloat16 if precision == "bf16" else torch.float32, "cpu", repeats=3)


def count_operations(macs: MacCount, request: PlanRequest) -> Operations:
    """Operations of a step and of the run.

    Args:
        macs: of one forward pass of one image.
    """
    again = _again(macs, request.activation_checkpointing, request.device)
    train = 2 * TRAINING_FORWARDS * macs.total + again
    step = train * request.batch_size
    return Operations(2 * macs.total, train, again, step, step * request.steps)


def _again(macs: MacCount, policy: CheckpointPolicy, device: str) -> int:
    """Selective keeps what takes long; on a CPU scans and transforms run in C, which nobody can keep results of."""
    if policy == "none" or (policy == "selective" and device != "cpu"):
        return 0
    return 2 * (macs.total if policy == "full" else macs.total - macs.published)


def _utilisation(request: PlanRequest, device: DeviceKind) -> tuple[tuple[float, ...], str, list[str]]:
    notes: list[str] = []
    told = request.measured
    if told is None:
        return tuple(sorted(request.utilisation)), "assumed", notes
    network = told.network or request.network
    macs = count_macs(network)
    if network != request.network:
        notes.append(
            f"the measured run trained another network ({macs.total / 1e9:,.3f} GMACs an image); its utilisation is "
            "carried over by multiply-adds"
        )
    if told.device != request.device or told.precision != request.precision:
        notes.append(
            f"the measured run was on {told.device} in {told.precision}; its share of that peak is carried over to "
            f"{request.device} in {request.precision}"
        )
    flops = 2 * TRAINING_FORWARDS * macs.total + _again(macs, told.activation_checkpointing, told.device)
    shares = tuple(rate * flops / (told.devices * _peak_of(told, request, device)) for rate in _rates(told))
    if shares[-1] > 1:
        raise ConfigError(
            f"{told.source}: {told.images_per_second:,.1f} images a second are {shares[-1]:.1f} times the peak of "
            f"{told.devices} x {told.device} in {told.precision}: check the kind and number of devices"
        )
    return shares, f"measured on {told.devices} x {told.device}, {told.source}", notes


def _rates(told: Measured) -> tuple[float, float, float]:
    middle = told.images_per_second
    low = middle * (1 - MEASURED_SPREAD) if told.low is None else told.low
    high = middle * (1 + MEASURED_SPREAD) if told.high is None else told.high
    return low, middle, high


def _peak_of(told: Measured, request: PlanRequest, device: DeviceKind) -> float:
    if told.peak_tflops is not None:
        return told.peak_tflops * 1e12
    if told.device == request.device and told.precision == request.precision:
        return device.peak(told.precision)
    return find_device(told.device).peak(told.precision) or measured_peak(told.precision)


def _stored(by_group: dict[str, int], request: PlanRequest) -> Stored:
    total = sum(by_group.values())
    write = total / (request.write_gb_per_second * 1e9)
    copy = total / request.shards / (request.copy_gb_per_second * 1e9)
    return Stored(
        bytes=total,
        by_group=by_group,
        write_seconds=write,
        copy_seconds=copy,
        waiting=save_interval(write, request.ranks),
        background=save_interval(min(copy, write), request.ranks, busy_seconds=write),
    )
