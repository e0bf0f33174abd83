"""The long convolution in C: exact for every length and width, in memory of any layout, with any number of threads."""

import pytest
import torch

from smalti.ops import s4d, s4d_kernel, two_way_conv
from smalti.ops.s4d import c as twin
from smalti.ops.s4d import convolve_c, spectrum_c

pytestmark = [
    pytest.mark.usefixtures("deterministic"),
    pytest.mark.skipif(twin.unavailable() != "", reason=twin.unavailable() or "never"),
]

EPS = torch.finfo(torch.float32).eps


def doubles(args):
    return [a.detach().double() for a in args]


def with_gradients(impl, args, above):
    leaves = [a.detach().requires_grad_() for a in args]
    output = two_way_conv(*leaves, impl=impl)
    return output.detach(), *torch.autograd.grad(output, leaves, above.to(output.dtype))


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


# Leaves of one, three, five and seven terms; trees of odd and even depth; the smallest of each.
@pytest.mark.parametrize("tokens", [*range(2, 21), 24, 28, 40, 48, 56, 96, 128, 160, 224, 1000, 1024, 1028, 1600, 4096])
def test_every_length_is_as_exact_as_a_transform_forward_and_backward(tokens):
    args = two_way_conv.example(tokens, torch.float32, channels=3)
    above = torch.randn(2, 3, tokens, generator=torch.Generator().manual_seed(1))
    found, exact = with_gradients("c", args, above), with_gradients("fft", doubles(args), above)
    for i, (f, e) in enumerate(zip(found, exact, strict=True)):
        assert error(f, e) <= 8 * EPS, i


@pytest.mark.parametrize("tokens", [1, 2, 3, 100, 129, 640, 641, 4097])
def test_room_for_all_lags_without_much_of_it_empty(tokens):
    size, leaf, turns = twin._plan(tokens)
    assert tokens <= size <= max(2, 1.34 * tokens)
    assert leaf in (1, 3, 5, 7)
    assert bin(size // leaf).count("1") == 1
    assert size % (2 * leaf) == 0
    assert len(turns) // 2 > size // leaf // 2


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 33])
def test_channels_do_not_see_each_other_whatever_their_number(channels):
    args = two_way_conv.example(50, torch.float32, channels=channels)
    above = torch.ones(2, channels, 50)
    whole = with_gradients("c", args, above)
    for c in {0, channels // 2, channels - 1}:
        x, *rows = args
        alone = with_gradients("c", [x[:, c : c + 1], *(r[c : c + 1] for r in rows)], above[:, :1])
        assert torch.equal(whole[0][:, c : c + 1], alone[0])
        assert torch.equal(whole[1][:, c : c + 1], alone[1])
        assert all(torch.equal(w[c : c + 1], a) for w, a in zip(whole[2:], alone[2:], strict=True))


def test_three_tokens_worked_out_by_hand():
    x = torch.tensor([[[1.0, 10.0, 100.0]]])
    forward, backward, skip = torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[5.0, 6.0, 7.0]]), torch.tensor([1.0])
    expected = torch.tensor([[[3 + 50 + 600.0, 3 + 30 + 500.0, 4 + 30 + 300.0]]])
    torch.testing.assert_close(two_way_conv(x, forward, backward, skip, impl="c"), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_an_impulse_shows_both_kernels_and_the_skip(tokens):
    _, forward, backward, skip = (t.detach() for t in two_way_conv.example(tokens, torch.float32))
    for place in {0, tokens // 2, tokens - 1}:
        x = torch.zeros(1, len(skip), tokens)
        x[..., place] = 1
        y = two_way_conv(x, forward, backward, skip, impl="c")[0]
        expected = torch.cat([backward[:, :place].flip(1), forward[:, : tokens - place]], dim=1)
        expected[:, place] += skip
        torch.testing.assert_close(y, expected, rtol=0, atol=8 * EPS * expected.abs().max().item())


def test_any_layout_in_memory_is_read_and_token_major_is_what_comes_out():
    x, *rows = (t.detach() for t in two_way_conv.example(30, torch.float32))
    for other in (x.mT.contiguous().mT, x.repeat_interleave(2, dim=2)[..., ::2], x.flip(0).flip(0)):
        found = two_way_conv(other, *rows, impl="c")
        assert torch.equal(found, two_way_conv(x, *rows, impl="c"))
        assert found.mT.is_contiguous()
    spread = [r.repeat_interleave(2, dim=0)[::2] for r in rows]
    assert torch.equal(two_way_conv(x, *spread, impl="c"), two_way_conv(x, *rows, impl="c"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_threads_compute_what_one_does(dtype):
    args = two_way_conv.example(100, dtype, batch=3, channels=50)
    above = torch.randn(3, 50, 100, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(with_gradients("c", args, above))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_bfloat16_is_rounded_once_and_summed_in_float32():
    x, *kernels = two_way_conv.example(1024, torch.float32, batch=1)
    x = x.detach().bfloat16()
    exact = two_way_conv(x.double(), *doubles(kernels), impl="fft")
    found = two_way_conv(x, *kernels, impl="c")
    assert found.dtype == torch.bfloat16
    allowed = exact.abs() * torch.finfo(torch.bfloat16).eps / 2 + exact.abs().max() * 8 * EPS
    assert ((found.double() - exact).abs() <= allowed).all()


def test_a_kept_spectrum_gives_the_same_bits_and_fits_its_own_size_only():
    x, *rows = (t.detach() for t in two_way_conv.example(100, torch.float32))
    spectrum = spectrum_c(*rows)
    assert torch.equal(convolve_c(x.mT, spectrum).mT, two_way_conv(x, *rows, impl="c"))
    with pytest.raises(ValueError, match="a spectrum of shape"):
        convolve_c(torch.zeros(2, 300, 12), spectrum)


def test_gradients_have_gradients():
    args = [t.detach().requires_grad_() for t in two_way_conv.example(9, torch.float32)]
    exact_args = [t.detach().double().requires_grad_() for t in args]
    found, exact = (
        torch.autograd.grad(
            sum(
                g.square().sum()
                for g in torch.autograd.grad(two_way_conv(*given, impl=impl).square().sum(), given, create_graph=True)
            ),
            given,
        )
        for impl, given in (("c", args), ("reference", exact_args))
    )
    assert all(error(f, e) < 16 * EPS for f, e in zip(found, exact, strict=True))


def test_a_nan_in_one_channel_stays_in_it():
    x, *rows = (t.detach() for t in two_way_conv.example(20, torch.float32))
    x[0, 3, 7] = torch.nan
    y = two_way_conv(x, *rows, impl="c")
    assert y[0, 3].isnan().all()
    y[0, 3] = 0
    assert y.isfinite().all()


def test_what_it_cannot_read_is_refused_with_its_reason(no_shape_checks):
    x, *rows = (t.detach() for t in two_way_conv.example(20, torch.float32))
    assert "float64" in two_way_conv.refuses("c", (x.double(), *rows))
    assert "meta" in two_way_conv.refuses("c", (x.to("meta"), *rows))
    assert "nothing to convolve" in two_way_conv.refuses("c", (x[..., :0], *rows))
    assert two_way_conv(x[:0], *rows, impl="c").shape == (0, 12, 20)
    with pytest.raises(ValueError, match=r"expected shapes \(B, C, N\)"):
        two_way_conv(x, rows[0][:, :5], *rows[1:], impl="c")
    with pytest.raises(ValueError, match="cannot take these inputs"):
        s4d(*doubles(s4d.example(4, torch.float32)), impl="c")


def test_without_a_compiler_the_transform_takes_its_place(monkeypatch):
    args = s4d.example(12, torch.float32)
    monkeypatch.setattr(twin, "unavailable", lambda: "there is no C compiler")
    assert s4d.choice(*args) == "fft"
    with pytest.raises(ValueError, match="there is no C compiler"):
        s4d(*args, impl="c")


# --- the kernel


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("states", [1, 16, 21])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 200, 2100])
def test_kernels_are_at_most_twice_as_wrong_as_the_reference_forward_and_backward(discretization, states, length):
    args = s4d_kernel.example(1, torch.float32, channels=5, states=states, seed=states)
    above = torch.randn(5, length, generator=torch.Generator().manual_seed(1))
    runs = []
    for impl, given in (("reference", doubles(args)), ("reference", args), ("c", args)):
        leaves = [a.detach().requires_grad_() for a in given]
        kernel = s4d_kernel(*leaves, impl=impl, length=length, discretization=discretization)
        runs.append([kernel.detach(), *torch.autograd.grad(kernel, leaves, above.to(kernel.dtype))])
    for i, (e, p, f) in enumerate(zip(*runs, strict=True)):
        assert error(f, e) <= 2 * error(p, e) + 16 * EPS, i


def test_steps_and_decays_far_from_the_start_stay_finite():
    args = [t.detach().clone() for t in s4d_kernel.example(1, torch.float32)]
    for log_dt, log_decay in ((3.0, 5.0), (-12.0, -12.0), (2.0, -20.0), (0.0, 30.0)):
        args[0].fill_(log_dt)
        args[1].fill_(log_decay)
        leaves = [a.clone().requires_grad_() for a in args]
        kernel = s4d_kernel(*leaves, impl="c", length=500)
        gradients = torch.autograd.grad(kernel.square().sum(), leaves)
        assert kernel.isfinite().all()
        assert all(g.isfinite().all() for g in gradients)


def test_kernels_do_not_depend_on_threads_and_have_gradients_of_gradients():
    args = [a.detach().requires_grad_() for a in s4d_kernel.example(1, torch.float32, channels=40)]
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            kernel = s4d_kernel(*args, impl="c", length=100)
            runs.append([kernel, *torch.autograd.grad(kernel.square().sum(), args, create_graph=True)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    exact = [a.detach().double().requires_grad_() for a in args]
    first = torch.autograd.grad(
        s4d_kernel(*exact, impl="reference", length=100).square().sum(), exact, create_graph=True
    )
    found = torch.autograd.grad(sum(g.square().sum() for g in runs[0][1:]), args)
    for f, e in zip(found, torch.autograd.grad(sum(g.square().sum() for g in first), exact), strict=True):
        assert error(f, e) < 1e-4  # powers of 100 tokens times frequencies of 25 radians, twice
