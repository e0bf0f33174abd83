"""The CUDA kernels of Bi-WKV. Imported by `smalti.ops.bi_wkv.triton` when it launches them, since triton is optional.

A program owns one batch item and a block of channels, and walks over the tokens in chunks; a sequence of one chunk is
read once. Sums over the past and the future of a token are kept as (top, a, b): the numbers a e^top and b e^top, where
`top` is about the largest exponent among the terms, so that neither keys nor decay can overflow them. The neighbours
of a token stand at distance 0, as in the definition; hence a row reads the token before it for the past and the one
after it for the future.

Two ways lead to the sums over a chunk. Where decay over the chunk is moderate, e^((i - j) decay) is split into
e^(i decay) e^(-j decay), and plain prefix sums do it; else a scan joins segments, which holds for any decay.
"""

# ruff: noqa: ANN001, ANN201, ANN202, N803, RUF059
from typing import no_type_check

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1e30)  # the log weight of nothing; infinities would make NaN of their differences
# Tables of e^(+-decay i) reach e^(+-16) over half a chunk: above that their rounding shows, far above they overflow.
MOST_DECAY = tl.constexpr(32.0)
# With it, no term that underflows beside the largest key of its chunk can be a visible part of a result.
MOST_BONUS = tl.constexpr(20.0)


@triton.jit
@no_type_check
def _factor(exponent):
    """e^exponent for exponents that are below 1, or belong to nothing and may be anything."""
    return tl.exp(tl.minimum(exponent, 2.0))


@triton.jit
@no_type_check
def _moved(exponent, decay, count):
    """exponent - decay * count, exact where that is small: 12 bits of the decay times a count have no rounding."""
    most = (decay.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return (exponent - most * count) - (decay - most) * count


@triton.jit
@no_type_check
def _then(decay, count, top1, a1, b1, top2, a2, b2):
    """Two neighbouring segments as one, seen from the end of the second; the first fades by the second's length."""
    top = tl.floor(tl.maximum(top1 - decay * count, top2))  # whole numbers, so that their differences are exact
    first, second = _factor(_moved(top1 - top, decay, count)), _factor(top2 - top)
    return top, a1 * first + a2 * second, b1 * first + b2 * second


@triton.jit
@no_type_check
def _then_far(decay, count, top1, a1, b1, far_a1, far_b1, top2, a2, b2, far_a2, far_b2):
    """The same with the sums of distance times term, which grow by the second's length times the first's sums."""
    top = tl.floor(tl.maximum(top1 - decay * count, top2))
    first, second = _factor(_moved(top1 - top, decay, count)), _factor(top2 - top)
    far_a = (far_a1 + count * a1) * first + far_a2 * second
    far_b = (far_b1 + count * b1) * first + far_b2 * second
    return top, a1 * first + a2 * second, b1 * first + b2 * second, far_a, far_b


@triton.jit
@no_type_check
def _join(decay1, count1, top1, a1, b1, decay2, count2, top2, a2, b2):
    top, a, b = _then(decay2, count2, top1, a1, b1, top2, a2, b2)
    return decay2, count1 + count2, top, a, b


@triton.jit
@no_type_check
def _join_far(decay1, count1, top1, a1, b1, far_a1, far_b1, decay2, count2, top2, a2, b2, far_a2, far_b2):
    top, a, b, far_a, far_b = _then_far(
        decay2, count2, top1, a1, b1, far_a1, far_b1, top2, a2, b2, far_a2, far_b2
    )  # fmt: skip
    return decay2, count1 + count2, top, a, b, far_a, far_b


@triton.jit
@no_type_check
def _running(decay, log_weight, x0, x1, moderate, FUTURE: tl.constexpr, FAR: tl.constexpr, N: tl.constexpr):
    """Sums of e^(log_weight - distance decay) (x0, x1) from one end of the chunk up to each row, and its own term."""
    if moderate:
        place = tl.arange(0, N)[:, None].to(tl.float32) - (N - 1) / 2
        if FUTURE:
            place = -place
        top = tl.max(log_weight, axis=0)[None, :]
        there, back = tl.exp(place * decay), tl.exp(-place * decay)
        weight = tl.exp(log_weight - top) * there
        a = tl.cumsum(weight * x0, axis=0, reverse=FUTURE) * back
        b = tl.cumsum(weight * x1, axis=0, reverse=FUTURE) * back
        far_a, far_b = a, b
        if FAR:
            far_a = place * a - tl.cumsum(weight * place * x0, axis=0, reverse=FUTURE) * back
            far_b = place * b - tl.cumsum(weight * place * x1, axis=0, reverse=FUTURE) * back
        top = tl.broadcast_to(top, log_weight.shape)
    else:
        decays, ones = tl.broadcast_to(decay, log_weight.shape), tl.full(log_weight.shape, 1.0, tl.float32)
        top = tl.floor(log_weight)
        weight = _factor(log_weight - top)
        x0 = weight * x0
        x1 = weight * x1
        if FAR:
            none = tl.zeros_like(x0)
            _, _, top, a, b, far_a, far_b = tl.associative_scan(
                (decays, ones, top, x0, x1, none, none), 0, _join_far, reverse=FUTURE
            )
        else:
            _, _, top, a, b = tl.associative_scan((decays, ones, top, x0, x1), 0, _join, reverse=FUTURE)
            far_a, far_b = a, b
    return top, a, b, far_a, far_b


@triton.jit
@no_type_check
def _total(decay, log_weight, x0, x1, FUTURE: tl.constexpr, N: tl.constexpr):
    """The sums over a whole chunk, seen from its first row (the future) or its last (the past)."""
    distance = tl.arange(0, N)[:, None].to(tl.float32)
    if not FUTURE:
        distance = N - 1 - distance
    top = tl.floor(tl.max(log_weight - distance * decay, axis=0))[None, :]
    weight = _factor(_moved(-top, decay, distance) + log_weight)
    a, b = weight * x0, weight * x1
    return (
        top,
        tl.sum(a, axis=0)[None, :],
        tl.sum(b, axis=0)[None, :],
        tl.sum(distance * a, axis=0)[None, :],
        tl.sum(distance * b, axis=0)[None, :],
    )


@triton.jit
@no_type_check
def _terms(start, key, value, tokens, channels, channel, N: tl.constexpr):
    """What the rows from `start` on hold forward: their key, their value, and 1."""
    row = start + tl.arange(0, N)[:, None]
    there = (row >= 0) & (row < tokens) & (channel < channels)
    at = row * channels + channel
    log_weight = tl.where(there, tl.load(key + at, mask=there, other=0.0).to(tl.float32), EMPTY)  # halves overflow
    x0 = tl.load(value + at, mask=there, other=0.0).to(tl.float32)
    return log_weight, x0, there.to(tl.float32)


@triton.jit
@no_type_check
def _terms_back(start, lse, grad, mean, tokens, channels, channel, N: tl.constexpr):
    """The same backward: one over the denominator, the gradient from above, and the gradient times the output."""
    row = start + tl.arange(0, N)[:, None]
    there = (row >= 0) & (row < tokens) & (channel < channels)
    at = row * channels + channel
    log_weight = -tl.load(lse + at, mask=there, other=-EMPTY)
    x0 = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    return log_weight, x0, x0 * tl.load(mean + at, mask=there, other=0.0)


@triton.jit
@no_type_check
def _nothing(C: tl.constexpr):
    zero = tl.zeros([1, C], tl.float32)
    return zero + EMPTY, zero, zero, zero, zero


@triton.jit
@no_type_check
def _is_moderate(decay, bonus, N: tl.constexpr):
    return (tl.max(tl.abs(decay)) * N <= MOST_DECAY) & (tl.max(tl.abs(bonus)) <= MOST_BONUS)


@triton.jit
@no_type_check
def forward(
    decay, bonus, key, value, out, mean, lse, carry, tokens, channels,
    SAVE: tl.constexpr, ROUNDED: tl.constexpr, CHUNKS: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The mean; with SAVE also the log of its denominator, and in float32 what `out` holds in a shorter dtype.

    `carry` has 3 rows per chunk: what the future brings in.
    """
    blocks = tl.cdiv(channels, C)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * C + tl.arange(0, C)[None, :]
    here = channel < channels
    w = tl.load(decay + channel, mask=here, other=0.0).to(tl.float32)
    u = tl.load(bonus + channel, mask=here, other=0.0).to(tl.float32)
    moderate = _is_moderate(w, u, N)
    key += item * tokens * channels
    value += item * tokens * channels
    out += item * tokens * channels
    lse += item * tokens * channels
    mean += item * tokens * channels
    carry += item * CHUNKS * 3 * channels
    row = tl.arange(0, N)[:, None]

    if CHUNKS > 1:
        top, a, b, far_a, far_b = _nothing(C)
        for i in range(CHUNKS):
            chunk = CHUNKS - 1 - i
            at = carry + chunk * 3 * channels + channel
            tl.store(at, top, mask=here)
            tl.store(at + channels, a, mask=here)
            tl.store(at + 2 * channels, b, mask=here)
            log_weight, x0, x1 = _terms(chunk * N + 1, key, value, tokens, channels, channel, N)
            top2, a2, b2, far_a2, far_b2 = _total(w, log_weight, x0, x1, True, N)
            top, a, b = _then(w, N * 1.0, top, a, b, top2, a2, b2)
        tl.debug_barrier()  # the loop below reads with other threads what this one wrote

    top, a, b, far_a, far_b = _nothing(C)
    for chunk in range(CHUNKS):
        start = chunk * N
        log_weight, x0, x1 = _terms(start - 1, key, value, tokens, channels, channel, N)
        top1, a1, b1, far_a1, far_b1 = _running(w, log_weight, x0, x1, moderate, False, False, N)
        if CHUNKS > 1:
            top2, a2, b2, far_a2, far_b2 = _total(w, log_weight, x0, x1, False, N)
            top1, a1, b1 = _then(w, row + 1.0, top, a, b, top1, a1, b1)
            top, a, b = _then(w, N * 1.0, top, a, b, top2, a2, b2)
        log_weight, x0, x1 = _terms(start + 1, key, value, tokens, channels, channel, N)
        top2, a2, b2, far_a2, far_b2 = _running(w, log_weight, x0, x1, moderate, True, False, N)
        if CHUNKS > 1:
            at = carry + chunk * 3 * channels + channel
            top3 = tl.load(at, mask=here, other=EMPTY)
            a3 = tl.load(at + channels, mask=here, other=0.0)
            b3 = tl.load(at + 2 * channels, mask=here, other=0.0)
            top2, a2, b2 = _then(w, 1.0 * N - row, top3, a3, b3, top2, a2, b2)
        k, v, x1 = _terms(start, key, value, tokens, channels, channel, N)
        most = tl.floor(tl.maximum(tl.maximum(top1, top2), k + u))
        past, future, own = _factor(top1 - most), _factor(top2 - most), _factor((k - most) + u)
        denominator = past * b1 + future * b2 + own
        exact = (past * a1 + future * a2 + own * v) / denominator
        there = (start + row < tokens) & here
        at = (start + row) * channels + channel
        tl.store(out + at, exact.to(out.dtype.element_ty), mask=there)
        if SAVE:
            tl.store(lse + at, most + tl.log(denominator), mask=there)
            if ROUNDED:
                tl.store(mean + at, exact, mask=there)


@triton.jit
@no_type_check
def backward(
    decay, bonus, key, value, mean, lse, grad, grad_decay, grad_bonus, grad_key, grad_value, carry, tokens, channels,
    CHUNKS: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """All gradients; those of decay and bonus for this batch item alone. `carry` holds 5 rows per chunk.

    With weight(t, i) = e^(key_i - distance(t, i) decay - lse_t), the share of token i in the mean of token t:
    grad value_i = sum_t weight grad_t, and grad key_i = sum_t weight grad_t (value_i - mean_t). The sum is the forward
    one with -lse in the place of keys. Decay takes each term times minus its distance.
    """
    blocks = tl.cdiv(channels, C)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * C + tl.arange(0, C)[None, :]
    here = channel < channels
    w = tl.load(decay + channel, mask=here, other=0.0).to(tl.float32)
    u = tl.load(bonus + channel, mask=here, other=0.0).to(tl.float32)
    moderate = _is_moderate(w, u, N)
    key += item * tokens * channels
    value += item * tokens * channels
    mean += item * tokens * channels
    lse += item * tokens * channels
    grad += item * tokens * channels
    grad_key += item * tokens * channels
    grad_value += item * tokens * channels
    carry += item * CHUNKS * 5 * channels
    row = tl.arange(0, N)[:, None]

    if CHUNKS > 1:
        top, a, b, far_a, far_b = _nothing(C)
        for i in range(CHUNKS):
            chunk = CHUNKS - 1 - i
            at = carry + chunk * 5 * channels + channel
            tl.store(at, top, mask=here)
            tl.store(at + channels, a, mask=here)
            tl.store(at + 2 * channels, b, mask=here)
            tl.store(at + 3 * channels, far_a, mask=here)
            tl.store(at + 4 * channels, far_b, mask=here)
            log_weight, x0, x1 = _terms_back(chunk * N + 1, lse, grad, mean, tokens, channels, channel, N)
            top2, a2, b2, far_a2, far_b2 = _total(w, log_weight, x0, x1, True, N)
            top, a, b, far_a, far_b = _then_far(w, N * 1.0, top, a, b, far_a, far_b, top2, a2, b2, far_a2, far_b2)
        tl.debug_barrier()  # the loop below reads with other threads what this one wrote

    top, a, b, far_a, far_b = _nothing(C)
    sum_decay, sum_bonus = tl.zeros([1, C], tl.float32), tl.zeros([1, C], tl.float32)
    for chunk in range(CHUNKS):
        start = chunk * N
        log_weight, x0, x1 = _terms_back(start - 1, lse, grad, mean, tokens, channels, channel, N)
        top1, a1, b1, far_a1, far_b1 = _running(w, log_weight, x0, x1, moderate, False, True, N)
        if CHUNKS > 1:
            top2, a2, b2, far_a2, far_b2 = _total(w, log_weight, x0, x1, False, N)
            top1, a1, b1, far_a1, far_b1 = _then_far(
                w, row + 1.0, top, a, b, far_a, far_b, top1, a1, b1, far_a1, far_b1
            )
            top, a, b, far_a, far_b = _then_far(w, N * 1.0, top, a, b, far_a, far_b, top2, a2, b2, far_a2, far_b2)
        log_weight, x0, x1 = _terms_back(start + 1, lse, grad, mean, tokens, channels, channel, N)
        top2, a2, b2, far_a2, far_b2 = _running(w, log_weight, x0, x1, moderate, True, True, N)
        if CHUNKS > 1:
            at = carry + chunk * 5 * channels + channel
            top3 = tl.load(at, mask=here, other=EMPTY)
            a3 = tl.load(at + channels, mask=here, other=0.0)
            b3 = tl.load(at + 2 * channels, mask=here, other=0.0)
            far_a3 = tl.load(at + 3 * channels, mask=here, other=0.0)
            far_b3 = tl.load(at + 4 * channels, mask=here, other=0.0)
            top2, a2, b2, far_a2, far_b2 = _then_far(
                w, 1.0 * N - row, top3, a3, b3, far_a3, far_b3, top2, a2, b2, far_a2, far_b2
            )
        k, v, there = _terms(start, key, value, tokens, channels, channel, N)
        log_weight, g, gy = _terms_back(start, lse, grad, mean, tokens, channels, channel, N)
        past, future, own = tl.exp(top1 + k), tl.exp(top2 + k), tl.exp((k + log_weight) + u)
        grad_v = past * a1 + future * a2 + own * g
        grad_k = v * grad_v - (past * b1 + future * b2 + own * gy)
        far = past * (v * far_a1 - far_b1) + future * (v * far_a2 - far_b2)
        sum_decay -= tl.sum(far * there, axis=0)[None, :]
        sum_bonus += tl.sum(own * (g * v - gy) * there, axis=0)[None, :]
        there = (start + row < tokens) & here
        at = (start + row) * channels + channel
        tl.store(grad_value + at, grad_v.to(grad_value.dtype.element_ty), mask=there)
        tl.store(grad_key + at, grad_k.to(grad_key.dtype.element_ty), mask=there)
    tl.store(grad_decay + item * channels + channel, sum_decay, mask=here)
    tl.store(grad_bonus + item * channels + channel, sum_bonus, mask=here)
