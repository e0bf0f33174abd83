"""The diagonal state space: kernels against the recurrence, convolutions against sums by hand, and exactness."""

import math

import pytest
import torch

from smalti.ops import force, s4d, s4d_kernel, two_way_conv
from smalti.ops.s4d import convolve, fft_size, two_way_spectrum

pytestmark = pytest.mark.usefixtures("deterministic")

KERNELS = pytest.mark.parametrize("impl", ["reference", "two_level"])
CONVS = pytest.mark.parametrize("impl", ["reference", "fft"])
DISCRETIZATIONS = pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
LENGTHS = [1, 2, 63, 257, 4096]
EPS = torch.finfo(torch.float32).eps


def doubles(args):
    return [a.detach().double() for a in args]


def error(found, exact, scale=None):
    return ((found.detach().double() - exact).abs().max() / (exact.abs().max() if scale is None else scale)).item()


# --- kernel


@KERNELS
def test_a_single_real_state_decays_as_worked_out_by_hand(impl):
    # A = -1, dt = log 2, w = 1: (e^(-log 2) - 1) / -1 = 1/2, halved at each step, doubled for the conjugate.
    one = torch.zeros(1, 1, dtype=torch.float64)
    weight = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    log_dt = torch.tensor([math.log(math.log(2))], dtype=torch.float64)
    found = s4d_kernel(log_dt, one, one, weight, impl=impl, length=4)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5, 0.25, 0.125]], dtype=torch.float64))
    # Bilinear with dt = 2/3: 1 - dt A / 2 = 4/3 and 1 + dt A / 2 = 2/3, so 2 * 2/3 / (4/3) = 1, halved at each step.
    log_dt = torch.tensor([math.log(2 / 3)], dtype=torch.float64)
    found = s4d_kernel(log_dt, one, one, weight, impl=impl, length=4, discretization="bilinear")
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5, 0.25, 0.125]], dtype=torch.float64))


@KERNELS
@DISCRETIZATIONS
@pytest.mark.parametrize("length", [1, 31, 32, 33, 300])
def test_the_kernel_is_the_impulse_response_of_the_discrete_recurrence(impl, discretization, length):
    args = doubles(s4d_kernel.example(length, torch.float32, seed=5))
    log_dt, log_decay, frequency, weight = args
    dt, a = log_dt.exp()[:, None], torch.complex(-log_decay.exp(), frequency)
    if discretization == "zoh":
        step, gain = (dt * a).exp(), ((dt * a).exp() - 1) / a
    else:
        step, gain = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
    state, expected = gain.clone(), []
    for _ in range(length):
        expected.append(2 * (torch.view_as_complex(weight) * state).sum(dim=1).real)
        state = step * state
    found = s4d_kernel(*args, impl=impl, length=length, discretization=discretization)
    torch.testing.assert_close(found, torch.stack(expected, dim=1), rtol=1e-10, atol=1e-12)


@DISCRETIZATIONS
@pytest.mark.parametrize("length", LENGTHS)
def test_the_fast_kernel_is_at_most_twice_as_wrong_as_the_reference(discretization, length):
    options = {"length": length, "discretization": discretization}
    for seed in range(3):
        args = s4d_kernel.example(length, torch.float32, seed=seed, channels=3, states=32)
        exact, plain, fast = (
            _with_gradients(lambda *a, impl=impl: s4d_kernel(*a, impl=impl, **options), given)
            for impl, given in (("reference", doubles(args)), ("reference", args), ("two_level", args))
        )
        assert error(fast[0], exact[0]) <= 2 * error(plain[0], exact[0]) + 4 * EPS, seed
        scale = max(e.abs().max() for e in exact[1:])
        for e, p, f in zip(exact[1:], plain[1:], fast[1:], strict=True):
            # A step size hears of all states, so its gradient is a sum of 2 * 32 numbers of either sign.
            assert error(f, e, scale) <= 2 * error(p, e, scale) + 64 * EPS, (seed, e.shape)


@DISCRETIZATIONS
def test_steps_and_decays_far_from_the_start_stay_finite_and_exact(discretization):
    # dt |A| from 1e-7 to 1e3, where e^z - 1 cancels and where nothing is left of e^z.
    log_dt = torch.linspace(math.log(1e-6), math.log(10.0), 7, dtype=torch.float64)
    args = [log_dt, torch.full((7, 4), 2.0), torch.linspace(0, 100, 28).view(7, 4), torch.randn(7, 4, 2)]
    args = [a.double().requires_grad_() for a in args]
    options = {"length": 257, "discretization": discretization}
    exact = s4d_kernel(*args, impl="reference", **options)
    single = s4d_kernel(*(a.detach().float().requires_grad_() for a in args), impl="two_level", **options)
    assert single.isfinite().all()
    # What does not die out at once turns by at most half a circle per step, and an angle is known to one rounding.
    assert error(single, exact) < 257 * math.pi * EPS
    fast = _with_gradients(lambda *a: s4d_kernel(*a, impl="two_level", **options), args)
    assert all(x.isfinite().all() for x in fast)


def _with_gradients(function, args):
    """Output and the gradient of every input, under a gradient from above that weighs all outputs differently."""
    args = [a.detach().clone().requires_grad_() for a in args]
    output = function(*args)
    above = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, args, above)]


# --- convolution


@CONVS
def test_three_tokens_worked_out_by_hand(impl):
    x = torch.tensor([[[1.0, 10.0, 100.0]]])
    forward, backward, skip = torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[5.0, 6.0, 7.0]]), torch.tensor([1.0])
    expected = torch.tensor([[[3 + 50 + 600.0, 3 + 30 + 500.0, 4 + 30 + 300.0]]])
    torch.testing.assert_close(two_way_conv(x, forward, backward, skip, impl=impl), expected, rtol=1e-6, atol=1e-4)


@CONVS
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_an_impulse_shows_both_kernels_beside_the_skip(impl, tokens):
    _, forward, backward, skip = doubles(two_way_conv.example(tokens, torch.float32))
    for place in {0, tokens // 2, tokens - 1}:
        x = torch.zeros(1, len(skip), tokens, dtype=torch.float64)
        x[..., place] = 1
        y = two_way_conv(x, forward, backward, skip, impl=impl)[0]
        y[:, place] -= skip
        torch.testing.assert_close(y[:, place:], forward[:, : tokens - place])
        torch.testing.assert_close(y[:, :place].flip(1), backward[:, :place])


@CONVS
def test_without_a_backward_kernel_no_token_sees_those_behind_it(impl):
    x, forward, backward, skip = doubles(two_way_conv.example(40, torch.float32))
    changed = x.clone()
    changed[..., 25:] = 7
    nothing = torch.zeros_like(backward)
    before, after = (two_way_conv(u, forward, nothing, skip, impl=impl)[..., :25] for u in (x, changed))
    torch.testing.assert_close(after, before)


@CONVS
def test_reversed_tokens_with_swapped_directions_are_the_reversed_output(impl):
    x, forward, backward, skip = doubles(two_way_conv.example(33, torch.float32))
    # Lag 0 belongs to the forward kernel: what stays there changes sides, the rest moves by one.
    ahead = torch.cat([forward[:, :1], backward[:, :-1]], dim=1)
    behind = torch.cat([forward[:, 1:], torch.zeros_like(forward[:, :1])], dim=1)
    expected = two_way_conv(x, forward, backward, skip, impl=impl).flip(2)
    torch.testing.assert_close(two_way_conv(x.flip(2), ahead, behind, skip, impl=impl), expected)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_fast_convolution_is_at_most_twice_as_wrong_as_the_direct_sum(tokens):
    args = two_way_conv.example(tokens, torch.float32, batch=1, channels=1 if tokens > 1000 else 5)
    runs = [
        _with_gradients(lambda *a, impl=impl: two_way_conv(*a, impl=impl), given)
        for impl, given in (("reference", doubles(args)), ("reference", args), ("fft", args))
    ]
    scale = max(e.abs().max() for e in runs[0][1:])
    for i, (e, p, f) in enumerate(zip(*runs, strict=True)):
        s = scale if i else e.abs().max()
        assert error(f, e, s) <= 2 * error(p, e, s) + 8 * EPS, i


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_summed_in_float32(dtype):
    x, *kernels = two_way_conv.example(1024, torch.float32, batch=1)
    x = x.detach().to(dtype)
    exact = two_way_conv(x.double(), *doubles(kernels), impl="reference")
    found = two_way_conv(x, *kernels, impl="fft")
    assert found.dtype == dtype
    # One rounding of each output to its dtype, and float32 below it.
    assert (
        (found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + exact.abs().max() * 8 * EPS
    ).all()


@pytest.mark.parametrize("length", [1, 2, 7, 63, 257, 1009, 4096, 4099])
def test_transforms_have_room_for_both_directions_and_no_large_prime(length):
    size = fft_size(length)
    assert 2 * length <= size <= 2 * length * 1.2 + 4
    assert size % 2 == 0
    for factor in (2, 3, 5):
        while size % factor == 0:
            size //= factor
    assert size == 1


def test_a_kept_spectrum_gives_the_same_bits():
    x, forward, backward, skip = (a.detach() for a in two_way_conv.example(100, torch.float32))
    kept = convolve(x, two_way_spectrum(forward, backward), skip)
    assert torch.equal(kept, two_way_conv(x, forward, backward, skip, impl="fft"))


# --- both


@DISCRETIZATIONS
@pytest.mark.parametrize("tokens", LENGTHS[:-1])
def test_the_whole_layer_is_its_two_halves_and_as_exact_as_its_reference(discretization, tokens):
    args = s4d.example(tokens, torch.float32, seed=1)
    options = {"discretization": discretization}
    runs = [
        _with_gradients(lambda *a, impl=impl: s4d(*a, impl=impl, **options), given)
        for impl, given in (("reference", doubles(args)), ("reference", args), ("fft", args))
    ]
    scale = max(e.abs().max() for e in runs[0][1:])
    for i, (e, p, f) in enumerate(zip(*runs, strict=True)):
        s = scale if i else e.abs().max()
        assert error(f, e, s) <= 2 * error(p, e, s) + 16 * EPS, i
    x, *rows, skip = doubles(args)
    kernels = [s4d_kernel(*(r[i] for r in rows), length=tokens, **options) for i in (0, 1)]
    torch.testing.assert_close(two_way_conv(x, *kernels, skip), runs[0][0])


def test_one_row_of_weights_looks_back_only_and_one_row_of_dynamics_serves_both():
    x, log_dt, log_decay, frequency, weight, skip = doubles(s4d.example(20, torch.float32))
    alone = s4d(x, log_dt[:1], log_decay[:1], frequency[:1], weight[:1], skip)
    silent = s4d(x, log_dt, log_decay, frequency, torch.stack([weight[0], 0 * weight[1]]), skip)
    torch.testing.assert_close(alone, silent)
    shared = s4d(x, log_dt[:1], log_decay[:1], frequency[:1], weight, skip)
    twice = s4d(x, *(p[:1].expand(2, *p.shape[1:]) for p in (log_dt, log_decay, frequency)), weight, skip)
    torch.testing.assert_close(shared, twice)


def test_mixed_precision_around_it_changes_nothing():
    args = tuple(a.detach() for a in s4d.example(64, torch.float32))
    plain = {impl: s4d(*args, impl=impl) for impl in ("reference", *s4d.fast) if not s4d.refuses(impl, args)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for impl, expected in plain.items():
            assert torch.equal(s4d(*args, impl=impl), expected)


def test_the_work_is_counted_per_image_and_once_for_the_kernels():
    one, two = (s4d.macs(*s4d.example(1024, torch.float32, batch=b, channels=8, states=32)) for b in (1, 2))
    assert two["fft"] == 2 * one["fft"]
    assert two["kernel"] == one["kernel"]
    # Two real transforms of 2.5 n log2 n operations, two to a multiply-add, and a product of four for n / 2 + 1.
    assert one["fft"] == 8 * (2.5 * 2048 * 11 + 4 * 1025)
    assert one["kernel"] == 8 * (2 * 2 * 32 * 1024 + 2.5 * 2048 * 11 / 2)


def test_the_choice_of_a_twin_can_be_asked_for():
    args = s4d.example(4, torch.float32)
    assert s4d.choice(*args) == next(impl for impl in s4d.fast if not s4d.refuses(impl, args))
    with force("reference"):
        assert s4d.choice(*args) == "reference"
