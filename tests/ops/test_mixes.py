"""C twins inside mixers and the depthwise convolution: by hand, at the edges, any number of threads, autocast."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from smalti.ops import OPS, cosine_heads, depthwise, quad_shift, shift_mix, sigmoid_gate, squared_relu

pytestmark = [
    pytest.mark.usefixtures("deterministic"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

EPS = torch.finfo(torch.float32).eps
TWINS = ["depthwise", "shift_mix", "squared_relu", "sigmoid_gate", "cosine_heads"]


def gradients(op, inputs, impl, **options):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*inputs, impl=impl, **options)
    above = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, above)]


def close(got, exact, sums):
    """Rounding of sums of this many numbers in float32, relative to the largest."""
    for g, e in zip(got, exact, strict=True):
        assert (g.double() - e).abs().max() <= (4 + sums**0.5) * EPS * max(e.abs().max().item(), 1e-30)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 9), (7, 8), (3, 17)])
@pytest.mark.parametrize("channels", [1, 15, 16, 20, 150])
def test_depthwise_of_every_width_and_plane_is_the_convolution(size, rows, columns, channels):
    generator = torch.Generator().manual_seed(size)
    shapes = ((2, rows, columns, channels), (channels, 1, size, size), (channels,))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    exact = gradients(depthwise, [x.double() for x in inputs], "reference")
    close(gradients(depthwise, inputs, "c"), exact, 2 * rows * columns + size**2)


def test_depthwise_takes_its_input_from_a_view_and_kernels_it_does_not_know_elsewhere():
    x = torch.randn(2, 6, 5, 24).transpose(1, 2).requires_grad_()
    weight, bias = torch.randn(24, 1, 3, 3), torch.randn(24)
    assert depthwise.choice(x, weight, bias) == "c"
    assert depthwise.choice(x.detach(), weight, bias) == "conv"  # faster where there is nothing to go back for
    assert torch.equal(depthwise(x, weight, bias, impl="c"), depthwise(x.contiguous(), weight, bias, impl="c"))
    with pytest.raises(ValueError, match=r"'c' cannot take these inputs: it wants shapes"):
        depthwise(x, torch.randn(24, 1, 7, 7), bias, impl="c")
    assert depthwise.choice(x, torch.randn(24, 1, 7, 7), bias) == "conv"
    assert depthwise.choice(x.double(), weight.double(), bias.double()) == "conv"


@pytest.mark.parametrize("name", TWINS)
def test_any_number_of_threads_gives_the_same_bits(name):
    op, threads, runs = OPS[name], torch.get_num_threads(), []
    wide = {"channels": 80} if name in ("depthwise", "shift_mix") else {}
    inputs = op.example(400, torch.float32, batch=3, **wide)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(gradients(op, inputs, "c"))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", TWINS)
def test_a_batch_item_does_not_depend_on_the_others_to_the_last_bit(name):
    op = OPS[name]
    inputs = op.example(48, torch.bfloat16, batch=3)
    batched = range(len(inputs)) if op.batched is None else op.batched
    alone = op(*(x[1:2] if i in batched else x for i, x in enumerate(inputs)), impl="c")
    assert torch.equal(op(*inputs, impl="c")[1:2], alone)


@pytest.mark.parametrize("name", TWINS)
def test_gradients_have_gradients(name):
    op = OPS[name]
    inputs = op.example(6, torch.float32)
    found = []
    for impl in ("c", "reference"):
        y = op(*inputs, impl=impl)
        uneven = torch.linspace(0, 1, y.numel()).view(y.shape)  # lengths of heads alone say nothing about angles
        first = torch.autograd.grad((uneven * y.square()).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for got, plain in zip(*found, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("op", [depthwise, shift_mix])
def test_under_autocast_the_output_has_the_lower_dtype_and_gradients_that_of_their_inputs(op):
    inputs = op.example(48, torch.float32, channels=20)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(*inputs, impl="c")
    assert y.dtype is torch.bfloat16
    exact = op(*inputs, impl="reference")
    assert (y - exact).abs().max() <= 2**-8 * exact.abs().max()
    found = torch.autograd.grad(y, inputs, torch.ones_like(y))
    plain = torch.autograd.grad(exact, inputs, torch.ones_like(exact))
    for got, expected in zip(found, plain, strict=True):
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [0, 1, 2, 5])
@pytest.mark.parametrize("fraction", [0.25, 0.2])
@pytest.mark.parametrize("impl", list(shift_mix.fast))
def test_mixtures_are_those_of_the_quad_shift(impl, shift, fraction):
    x, shares = (t.detach() for t in shift_mix.example(12, torch.float32, channels=23, mixtures=2))
    shifted = quad_shift(x, shift=shift, fraction=fraction)
    y = shift_mix(x, shares, impl=impl, shift=shift, fraction=fraction)
    for i in range(2):
        torch.testing.assert_close(y[:, i], shifted + shares[i] * (x - shifted), rtol=4 * EPS, atol=4 * EPS)
        assert y[:, i].is_contiguous()
    exact = gradients(shift_mix, [x.double(), shares.double()], "reference", shift=shift, fraction=fraction)
    close(gradients(shift_mix, [x, shares], impl, shift=shift, fraction=fraction), exact, 24)


@pytest.mark.parametrize("size", [2, 8, 12, 24, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_fixed_angles_have_the_gradients_of_the_definition(size, dtype):
    qkv, cos, sin, lengths = (x.detach() for x in cosine_heads.example(9, dtype, head_size=size))
    above = torch.randn(2, 3, 3, 9, size, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for impl, wide in (("c", dtype), ("reference", torch.float64)):
        sources = [x.to(wide).requires_grad_() for x in (qkv, lengths)]
        y = cosine_heads(sources[0], cos.to(wide), sin.to(wide), sources[1], impl=impl)
        found.append([y.detach(), *torch.autograd.grad(y, sources, above.to(wide))])
    eps = torch.finfo(dtype).eps
    for got, exact in zip(*found, strict=True):
        assert (got.double() - exact).abs().max() <= (2 * eps + 20 * EPS) * exact.abs().max()


def test_a_head_of_zeros_stays_zero_and_has_finite_gradients():
    qkv, cos, sin, lengths = (x.detach() for x in cosine_heads.example(4, torch.float32))
    qkv[:, 1] = 0
    qkv.requires_grad_()
    y = cosine_heads(qkv, cos, sin, lengths, impl="c")
    assert (y[:, :, :, 1] == 0).all()
    (gradient,) = torch.autograd.grad(y[:, :, :, [0, 2, 3]].sum(), qkv)
    assert gradient.isfinite().all()


def test_numbers_that_are_none_and_infinities_pass_as_in_the_definition():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 3.0, -3.0, 100.0, -100.0])
    assert torch.equal(squared_relu(x, impl="c").nan_to_num(7), F.relu(x).square().nan_to_num(7))
    torch.testing.assert_close(
        sigmoid_gate(x, torch.full_like(x, 2.0), impl="c"), 2 * x.sigmoid(), rtol=4 * EPS, atol=1e-37, equal_nan=True
    )
