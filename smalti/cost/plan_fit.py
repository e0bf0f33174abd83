"""Whether a run fits its device, and the nearest one that would."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from smalti.cost.plan_devices import GIB, DeviceKind
from smalti.cost.plan_request import CheckpointPolicy, PlanRequest
from smalti.cost.plan_state import state_memory
from smalti.cost.plan_step import ApplyPolicy, StepMemory, step_memory

# Of a device's memory. The rest is for its context, for libraries, and for holes between tensors.
FITS, TIGHT = 0.90, 0.97


@dataclass(frozen=True)
class Fit:
    """Memory of the process that needs most, against its device.

    Args:
        peak: bytes at the worst moment, activations, gradients and state together.
        memory: bytes of the device.
        verdict: yes below 90 % of it, tight up to 97 %, else no.
        largest_micro_batch: that stays below 90 %, at most the share of one process; 0 = not even one image.
        advice: what would make it fit, best first; empty where it does.
    """

    peak: int
    memory: int
    verdict: Literal["yes", "tight", "no"]
    largest_micro_batch: int
    advice: tuple[str, ...]


def find_fit(
    request: PlanRequest, device: DeviceKind, network: nn.Module, apply_policy: ApplyPolicy | None
) -> tuple[StepMemory, Fit]:
    """Memory of one step as asked for, and the search for the largest one that fits.

    Memory is affine in the images of a micro-batch as long as the worst moment stays the same one; the search goes
    along that line and then looks at what it found.
    """

    def needs(asked: PlanRequest) -> tuple[StepMemory, int]:
        step = step_memory(
            asked.network,
            asked.images_at_once,
            precision=asked.precision,
            policy=asked.activation_checkpointing,
            hardware="cpu" if device.name == "cpu" else "cuda",
            accumulating=asked.micro_batches > 1 or asked.strategy == "ddp",  # its gradients are views of what travels
            apply_policy=apply_policy,
        )
        return step, peak_memory_of(network, asked, step)

    step, peak = needs(request)
    limit = FITS * device.memory
    verdict: Literal["yes", "tight", "no"] = (
        "yes" if peak <= limit else "tight" if peak <= TIGHT * device.memory else "no"
    )
    largest = _largest(request, limit, lambda asked: needs(asked)[1])
    lighter = _LIGHTER[request.activation_checkpointing] if apply_policy is not None else ()
    advice = () if verdict == "yes" else tuple(_advice(request, limit, largest, lighter, lambda asked: needs(asked)[1]))
    return step, Fit(peak, device.memory, verdict, largest, advice)


def peak_memory_of(network: nn.Module, request: PlanRequest, step: StepMemory) -> int:
    """Bytes of the process that holds most, at its worst moment: in forward and backward, or in the update."""
    state = state_memory(network, request).most
    update = state.total + state.optimizer
    if request.shards > 1:
        return max(update, state.total + state.gathered + state.reduced + step.peak_without_copies)
    return max(update, state.kept + step.peak_with_gradients)


def _largest(request: PlanRequest, limit: float, needs: Callable[[PlanRequest], int]) -> int:
    """The most images at once that stay below the limit."""

    def at(images: int) -> int:
        return needs(dataclasses.replace(request, micro_batch=images))

    whole = request.local_batch
    if at(whole) <= limit:
        return whole
    if at(1) > limit:
        return 0
    low, high = 1, whole  # low fits, high does not
    below, above = at(1), at(whole)
    while high - low > 1:
        guess = low + math.floor((limit - below) / (above - below) * (high - low))
        guess = min(high - 1, max(low + 1, guess))
        found = at(guess)
        if found <= limit:
            low, below = guess, found
            if guess + 1 < high and (next_one := at(guess + 1)) > limit:
                high, above = guess + 1, next_one
        else:
            high, above = guess, found
            if guess - 1 > low and (last_one := at(guess - 1)) <= limit:
                low, below = guess - 1, last_one
    return low


_LIGHTER: dict[str, tuple[CheckpointPolicy, ...]] = {"none": ("selective", "full"), "selective": ("full",), "full": ()}


def _advice(
    request: PlanRequest,
    limit: float,
    largest: int,
    lighter: tuple[CheckpointPolicy, ...],
    needs: Callable[[PlanRequest], int],
) -> Iterator[str]:
    """Changes that make it fit, one at a time; where none does, all of them together."""
    found = 0 < largest < request.images_at_once
    if found:
        yield f"--micro-batch {largest}: the largest that fits, same results"
    for policy in lighter:
        peak = needs(dataclasses.replace(request, activation_checkpointing=policy))
        if peak <= limit:
            found = True
            yield f"--activation-checkpointing {policy}: {peak / GIB:,.1f} GiB"
            break
    if request.ranks > 1 and request.shards == 1:
        peak = needs(dataclasses.replace(request, strategy="fsdp"))
        if peak <= limit:
            found = True
            yield f"--strategy fsdp: {peak / GIB:,.1f} GiB"
    if found:
        return
    changes: dict[str, Any] = {"micro_batch": 1}
    if lighter:
        changes["activation_checkpointing"] = lighter[-1]
    if request.ranks > 1:
        changes |= {"strategy": "fsdp", "shard_size": None}
    peak = needs(dataclasses.replace(request, **changes))
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items() if value is not None)
    if peak <= limit:
        yield f"{flags}: {peak / GIB:,.1f} GiB"
    else:
        yield (
            f"nothing on these devices: {flags} still needs {peak / GIB:,.1f} GiB; take more devices that share the "
            f"state, or some of {peak / FITS / GIB:,.0f} GiB"
        )
