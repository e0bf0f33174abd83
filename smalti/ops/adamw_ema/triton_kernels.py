"""The CUDA kernel of AdamW and average. Imported by `smalti.ops.adamw_ema.triton` when it launches it.

One launch serves all tensors of a group: a program takes one piece of one tensor, and finds by tables which. Tensors
come as addresses, because a launch takes a fixed number of arguments.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803
from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _at(addresses, place, ALIGNED: tl.constexpr):
    """The tensor at a place of the table; vectors are only read from addresses known to be multiples of 16."""
    tensor = tl.load(addresses + place).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        tensor = tl.multiple_of(tensor, 16)
    return tensor


@triton.jit
@no_type_check
def _towards(own, other, weight):
    """lerp: from the nearer end, so that a weight of 1 gives `other`."""
    way = other - own
    return tl.where(tl.abs(weight) < 0.5, own + weight * way, other + (weight - 1.0) * way)


@triton.jit
@no_type_check
def _block(weights, gradients, moments, squares, averages, there, rate, root, fresh1, fresh2, beta2, epsilon, keep,
           blend):  # fmt: skip
    """The step of as many elements as a program holds at a time."""
    gradient = tl.load(gradients, there)
    moment = _towards(tl.load(moments, there), gradient, fresh1)
    square = beta2 * tl.load(squares, there) + fresh2 * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(square), root) + epsilon
    weight = tl.load(weights, there) * keep - tl.div_rn(rate * moment, denominator)
    average = _towards(tl.load(averages, there), weight, blend)
    tl.store(weights, weight, there)
    tl.store(moments, moment, there)
    tl.store(squares, square, there)
    tl.store(averages, average, there)


@triton.jit
@no_type_check
def update(addresses, sizes, owners, pieces, rates, count, PIECE: tl.constexpr, BLOCK: tl.constexpr,
           ALIGNED: tl.constexpr):  # fmt: skip
    """One piece of one tensor.

    `rates`, in float64: learning rate, logarithms of the betas, 1 - betas, second beta, epsilon, 1 - learning rate x
    weight decay, step of the average.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    begin = tl.load(pieces + program).to(tl.int64) * PIECE
    size = tl.load(sizes + owner)
    weights = _at(addresses, owner, ALIGNED)
    gradients = _at(addresses, owner + count, ALIGNED)
    moments = _at(addresses, owner + 2 * count, ALIGNED)
    squares = _at(addresses, owner + 3 * count, ALIGNED)
    averages = _at(addresses, owner + 4 * count, ALIGNED)
    # In float64: 1 - beta^step of a beta near 1 would keep few digits in float32.
    step = tl.load(_at(addresses, owner + 5 * count, False)).to(tl.float64)
    rate = (tl.load(rates) / (1.0 - tl.exp(step * tl.load(rates + 1)))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(step * tl.load(rates + 2))).to(tl.float32)
    fresh1, fresh2 = tl.load(rates + 3).to(tl.float32), tl.load(rates + 4).to(tl.float32)
    beta2, epsilon = tl.load(rates + 5).to(tl.float32), tl.load(rates + 6).to(tl.float32)
    keep, blend = tl.load(rates + 7).to(tl.float32), tl.load(rates + 8).to(tl.float32)
    if begin + PIECE <= size:  # without a mask, which would keep vectors apart
        for start in range(0, PIECE, BLOCK):
            at = begin + start + tl.arange(0, BLOCK)
            _block(weights + at, gradients + at, moments + at, squares + at, averages + at, None,
                   rate, root, fresh1, fresh2, beta2, epsilon, keep, blend)  # fmt: skip
    else:
        for start in range(0, PIECE, BLOCK):
            at = begin + start + tl.arange(0, BLOCK)
            _block(weights + at, gradients + at, moments + at, squares + at, averages + at, at < size,
                   rate, root, fresh1, fresh2, beta2, epsilon, keep, blend)  # fmt: skip
