"""Hours and money of a run as a band, how often to save it, and what a set of samples takes."""

import math
from dataclasses import dataclass

from smalti.cost.plan_communication import Communication
from smalti.cost.plan_devices import DeviceKind
from smalti.cost.plan_request import PlanRequest

# 419 unexpected stops of 16,384 devices in 54 days. Source: Llama Team 2024, arXiv:2407.21783, sec. 3.3.4.
MTBF_HOURS = 50_700.0


@dataclass(frozen=True)
class Pace:
    """What holds at one utilisation.

    Args:
        utilisation: useful operations per second as a share of the device's peak, communication left out.
        compute_seconds, step_seconds: of one step; the step lasts as long as the slower of computing and telling.
        bound: which of the two that is.
        hours: of the whole run. device_hours: summed over devices. cost: at the price asked about; None = no price.
        images_per_second: of all devices.
    """

    utilisation: float
    compute_seconds: float
    step_seconds: float
    bound: str
    images_per_second: float
    hours: float
    device_hours: float
    cost: float | None


def pace(request: PlanRequest, device: DeviceKind, utilisation: float, flops: int, told: Communication) -> Pace:
    """One step and the run, if computing and communicating overlap as far as they can.

    Args:
        flops: operations of one step, all devices together, what is computed twice included.
    """
    compute = flops / (utilisation * device.peak(request.precision) * request.ranks)
    step = max(compute, told.seconds)
    hours = step * request.steps / 3600
    device_hours = hours * request.ranks
    return Pace(
        utilisation,
        compute,
        step,
        "communication" if told.seconds > compute else "compute",
        request.batch_size / step,
        hours,
        device_hours,
        None if request.price_per_hour is None else device_hours * request.price_per_hour,
    )


@dataclass(frozen=True)
class SampleCost:
    """Device hours of a set of samples at one utilisation, and their price."""

    utilisation: float
    device_hours: float
    cost: float | None


def sampling_cost(request: PlanRequest, device: DeviceKind, utilisation: float, forward_flops: int) -> SampleCost:
    """Every step is one forward pass, or two with guidance; decoding is left out.

    Args:
        forward_flops: operations of one forward pass of one image.
    """
    passes = request.sample_images * request.sample_steps * (2 if request.guidance_scale != 1 else 1)
    hours = passes * forward_flops / (utilisation * device.peak(request.precision)) / 3600
    return SampleCost(utilisation, hours, None if request.price_per_hour is None else hours * request.price_per_hour)


@dataclass(frozen=True)
class SaveInterval:
    """How often to store a checkpoint so that the least is lost to storing and to failures.

    Args:
        save_seconds: that training stands still for one checkpoint.
        mtbf_hours: expected time between two failures of the whole run.
        seconds: best time between two checkpoints, never less than a checkpoint takes.
        overhead: share of the run that goes into storing and into steps done again.
    """

    save_seconds: float
    mtbf_hours: float
    seconds: float
    overhead: float


def save_interval(save_seconds: float, devices: int, *, busy_seconds: float = 0.0) -> SaveInterval:
    """The interval of Young and Daly, sqrt(2 save mtbf), to first order.

    Args:
        save_seconds: that training waits for.
        devices: whose failures stop the run.
        busy_seconds: that a checkpoint takes in all, in the background included; the next one cannot begin before.

    Source: Young 1974, doi:10.1145/361147.361115; Daly 2006, doi:10.1016/j.future.2004.11.016.
    """
    mtbf = MTBF_HOURS / devices
    best = max(math.sqrt(2 * save_seconds * mtbf * 3600), save_seconds, busy_seconds)
    return SaveInterval(save_seconds, mtbf, best, save_seconds / best + best / (2 * mtbf * 3600))
