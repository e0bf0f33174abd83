"""The definition of the step, and what its twins take."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What all tensors of a step share.

    Args:
        betas: shares of the old moments that stay, of the first and of the second.
        epsilon: added to the root of the second moment.
        average: share of the way that the average goes towards the new weights: 1 - decay.
    """

    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    average: float


class Operands(NamedTuple):
    """Tensors of one step, by position: gradients are read, all else is changed.

    Args:
        moments: averages of the gradients.
        squares: averages of their squares.
        averages: of the weights.
        steps: one number each, how many steps a weight has seen; counted up before it is used.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    moments: list[Tensor]
    squares: list[Tensor]
    averages: list[Tensor]
    steps: list[Tensor]


def adamw_ema_reference(
    weight: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    moment: Float[Tensor, "*shape"],
    square: Float[Tensor, "*shape"],
    average: Float[Tensor, "*shape"],
    step: int,
    rates: Rates,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Weight, first moment, second moment and average after step number `step`, counted from 1.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, without its schedule multiplier; the average by one
    `torch.lerp` towards the new weight.
    """
    beta1, beta2 = rates.betas
    moment = torch.lerp(moment, gradient, 1 - beta1)
    square = beta2 * square + (1 - beta2) * gradient.square()
    root = square.sqrt() / math.sqrt(1 - beta2**step) + rates.epsilon
    weight = weight * (1 - rates.learning_rate * rates.weight_decay)
    weight = weight - rates.learning_rate / (1 - beta1**step) * moment / root
    return weight, moment, square, torch.lerp(average, weight, rates.average)


PLAIN = {Tensor, torch.nn.Parameter}


def layout_refusal(operands: Operands) -> str:
    """What no twin takes; "" = memory that can be read as rows of float32 side by side."""
    device = operands.weights[0].device
    # Asked in every step, so one question at a time of all tensors; which one it is comes after a no.
    tensors = [x for column in operands for x in column]
    sizes = [[x.numel() for x in column] for column in operands]
    if (
        {type(x) for x in tensors} <= PLAIN
        and {x.dtype for x in tensors} == {torch.float32}
        and {x.device for x in tensors} == {device}
        and {x.layout for x in tensors} == {torch.strided}
        and all(map(Tensor.is_contiguous, tensors))
        and all(column == sizes[0] for column in sizes[1:5])
        and set(sizes[5]) == {1}
    ):
        return ""
    return next(filter(None, (_complaint(row, device) for row in zip(*operands, strict=True))))


def _complaint(row: tuple[Tensor, ...], device: torch.device) -> str:
    *members, step = row
    for x in members:
        if type(x) not in PLAIN:
            return f"it reads memory, which a {type(x).__name__} may not have"
        if x.device != device:
            return f"all tensors must be on one device, got {device} and {x.device}"
        if x.dtype is not torch.float32:
            return f"it takes float32, got {x.dtype}"
        if x.layout is not torch.strided or not x.is_contiguous() or x.numel() != members[0].numel():
            return f"it takes contiguous tensors of one shape, got {[(tuple(y.shape), y.layout) for y in members]}"
    if type(step) in PLAIN and (step.dtype, step.device, step.numel()) == (torch.float32, device, 1):
        return ""
    return f"it counts steps in one float32 on {device}, got a {type(step).__name__}, {step.dtype}, on {step.device}"
