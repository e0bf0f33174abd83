"""Twin in plain PyTorch for any device: the two directions as sums over earlier and over later tokens.

The decay is the same at every token, so e^{-(n-1-i) decay} = e^{-(n-1) decay} e^{i decay}: each direction is a plain
running sum of scaled terms. Exponents are counted from the middle of the sequence, which keeps them in range while
|decay| N is moderate. For stronger decays each sum gets an exponent of its own and doubles its reach log2(N) times.
Both ways yield the same thing, pairs (exponent, sums) meaning e^exponent sums, so the rest is written once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Sums = tuple[Tensor, Tensor]  # exponent (B, N or 1, C), sums (2, B, N, C)
TwoSides = Callable[[Tensor, Tensor, Tensor], tuple[Sums, Sums, Sums]]

# Largest |decay| N and |bonus| of the scaled sums. Half of |decay| N goes into the scales on either side, and keys far
# below the largest one must not vanish where that one has decayed: 40 + 20 + log N stays below the 87 of float32.
SCALED_RANGE = {torch.float32: 40.0, torch.float64: 300.0}
CHUNK = 32
EMPTY = -1e30  # exponent of an empty sum: finite, so that differences of two are no NaN


def bi_wkv_prefix(
    decay: Float[Tensor, "C"], bonus: Float[Tensor, "C"], key: Float[Tensor, "B N C"], value: Float[Tensor, "B N C"]
) -> Float[Tensor, "B N C"]:
    """As `bi_wkv_reference`, with work like N; float32 inside for shorter types, and nothing kept but the inputs."""
    return torch.ops.smalti.bi_wkv_prefix(decay, bonus, key, value)


@torch.library.custom_op("smalti::bi_wkv_prefix", mutates_args=())
def _forward_op(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    dtype = _result_type(decay, bonus, key, value)
    with torch.autocast(key.device.type, enabled=False):
        two_sides, decay, bonus, key, value = _prepare(decay, bonus, key, value)
        own, past, future = two_sides(decay, key, _with_ones(value))
        _, (top, bottom) = _join(past, future, (own[0] + bonus, own[1]))
        return (top / bottom).to(dtype)


@torch.library.custom_op("smalti::bi_wkv_prefix_backward", mutates_args=())
def _backward_op(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, above: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtypes = [x.dtype for x in (decay, bonus, key, value)]
    with torch.autocast(key.device.type, enabled=False):
        two_sides, decay, bonus, key, value = _prepare(decay, bonus, key, value)
        # Gradients live on differences between values and outputs. Where few tokens have nearly all the weight these
        # are small, so values count from their mean by weight.
        value = value - (key.softmax(1) * value).sum(1, keepdim=True)
        own, past, future = two_sides(decay, key, _with_ones(value))
        exponent, (top, bottom) = _join(past, future, (own[0] + bonus, own[1]))
        # With P the weights and y the output, the gradient of weight P_ni is above_n (value_i - y_n): two more sums of
        # the same kind, now over the outputs n that see token i.
        scaled = above.to(bottom.dtype) / bottom
        g_own, g_past, g_future = two_sides(decay, -exponent, torch.stack((scaled, -scaled * top / bottom)))
        g_exponent, (g, h) = _join(g_past, g_future, (g_own[0] + bonus, g_own[1]))
        weight = (key + g_exponent).exp()
        by_value = weight * g
        by_key = value * by_value + weight * h
        by_bonus = (own[1] * g_own[1]).sum(0) * (own[0] + g_own[0] + bonus).exp()
        # Each token between n and i adds one decay to their distance: count the pairs that reach over it.
        by_decay = -_reaching_over(decay, g_past, future) - _reaching_over(decay, g_future, past)
        gradients = (by_decay.sum((0, 1)), by_bonus.sum((0, 1)), by_key, by_value)
        a, b, c, d = (x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))
        return a, b, c, d


@_forward_op.register_fake
def _(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(key, dtype=_result_type(decay, bonus, key, value), memory_format=torch.contiguous_format)


@_backward_op.register_fake
def _(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, above: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (decay, bonus, key, value))
    return a, b, c, d


def _backward(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.smalti.bi_wkv_prefix_backward(*ctx.saved_tensors, above)  # type: ignore[attr-defined]


def _keep(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


_forward_op.register_autograd(_backward, setup_context=_keep)


def _result_type(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _prepare(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor
) -> tuple[TwoSides, Tensor, Tensor, Tensor, Tensor]:
    """The way to sum that is in range for these numbers, and the inputs in its dtype."""
    dtype = torch.promote_types(_result_type(decay, bonus, key, value), torch.float32)
    reach = torch.maximum(decay.abs().max() * key.shape[1], bonus.abs().max()) if decay.numel() else decay.sum()
    two_sides: TwoSides = _scaled if reach <= SCALED_RANGE[dtype] else _doubling
    if two_sides is _doubling and key.device.type != "mps":  # which has no float64
        dtype = torch.float64
    decay, bonus, key, value = (x.to(dtype) for x in (decay, bonus, key, value))
    return two_sides, decay, bonus, key - key.amax(1, keepdim=True), value  # what all keys share cancels


def _with_ones(value: Tensor) -> Tensor:
    return torch.stack((value, torch.ones_like(value)))


def _join(*parts: Sums) -> Sums:
    exponent = parts[0][0]
    for other, _ in parts[1:]:
        exponent = torch.maximum(exponent, other)
    total = sum(sums * (one - exponent).exp() for one, sums in parts)
    assert isinstance(total, Tensor)
    return exponent, total


def _reaching_over(decay: Tensor, one_side: Sums, other_side: Sums) -> Tensor:
    products = (one_side[1] * other_side[1]).sum(0)
    return products * (one_side[0] + other_side[0] - decay).exp()


def _scaled(decay: Tensor, exponent: Tensor, x: Tensor) -> tuple[Sums, Sums, Sums]:
    """Terms e^exponent x themselves, and their decayed sums over earlier and later tokens; one exponent for all."""
    n = x.shape[2]
    largest = exponent.amax(1, keepdim=True)
    x = x * (exponent - largest).exp()
    position = torch.arange(n, device=x.device, dtype=x.dtype) - (n - 1) / 2
    growing, fading = (position[:, None] * decay).exp(), (-position[:, None] * decay).exp()  # (N, C)
    nearest = decay.exp()  # a neighbour has decayed by nothing yet
    past = _sums_before(x * growing) * (fading * nearest)
    future = _sums_after(x * fading) * (growing * nearest)
    return (largest, x), (largest, past), (largest, future)


def _sums_before(x: Tensor) -> Tensor:
    """Sums over earlier tokens. Products with triangles of ones are the fastest way on a CPU.

    Elsewhere, and where products may be rounded to fewer digits, the running sum of PyTorch.
    """
    n = x.shape[2]
    if x.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest":
        return F.pad(x.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
    chunks = -(-n // CHUNK)
    x = F.pad(x, (0, 0, 0, chunks * CHUNK - n)).unflatten(2, (chunks, CHUNK))
    inside = torch.ones(CHUNK, CHUNK, dtype=x.dtype).tril(-1) @ x
    before = torch.ones(chunks, chunks, dtype=x.dtype).tril(-1) @ x.sum(3)
    return (inside + before[:, :, :, None]).flatten(2, 3)[:, :, :n]


def _sums_after(x: Tensor) -> Tensor:
    return _sums_before(x.flip(2)).flip(2)


def _doubling(decay: Tensor, exponent: Tensor, x: Tensor) -> tuple[Sums, Sums, Sums]:
    """As `_scaled`, with an exponent for every sum: right for any decay, either sign, and any exponents."""
    exponent = exponent.expand(x.shape[1:])
    future_exponent, future = _doubling_before(decay, exponent.flip(1), x.flip(2))
    return (exponent, x), _doubling_before(decay, exponent, x), (future_exponent.flip(1), future.flip(2))


def _doubling_before(decay: Tensor, exponent: Tensor, x: Tensor) -> Sums:
    n = x.shape[2]
    exponent, x = _later(exponent, 1, EMPTY), _later(x, 1, 0.0)
    reach = 1
    while reach < n:
        older, farther = _later(exponent, reach, EMPTY) - reach * decay, _later(x, reach, 0.0)
        exponent, x = _join((exponent, x), (older, farther))
        reach *= 2
    return exponent, x


def _later(x: Tensor, tokens: int, fill: float) -> Tensor:
    return F.pad(x[..., : x.shape[-2] - tokens, :], (0, 0, tokens, 0), value=fill)
