"""GELU, adaLN and gated sum in C: the whole range of numbers, types under autocast, threads, and their refusals."""

import re

import pytest
import torch
import torch.nn.functional as F

from smalti.ops import adaln, fold_affine, force, gated_add, gelu
from smalti.ops.pointwise import ROWS, SOURCE

pytestmark = pytest.mark.usefixtures("deterministic")

EPS = torch.finfo(torch.float32).eps
POINTWISE = [adaln, gated_add, gelu]
FORMS = pytest.mark.parametrize("approximate", ["none", "tanh"])
EACH = pytest.mark.parametrize("op", POINTWISE, ids=lambda op: op.name)
C = pytest.mark.skipif(adaln.choice(*adaln.example(4, torch.float32)) != "c", reason="there is no C compiler here")


def random(*shape, dtype=torch.float32, seed=0, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


def big(op, dtype=torch.float32, batch=4):
    """More elements than one thread takes alone, and a number of tokens that leaves a block unfinished."""
    x, branch = (random(batch, 3 * ROWS + 5, 384, dtype=dtype, seed=seed) for seed in (0, 1))
    a, b = (random(batch, 1, 384, dtype=dtype, seed=seed) for seed in (2, 3))
    return {"adaln": (x, a, b), "gated_add": (x, a, branch), "gelu": (x,)}[op.name]


def everything(op, inputs, impl="auto"):
    output = op(*inputs, impl=impl)
    above = random(*output.shape, dtype=output.dtype, seed=9, grad=False)
    return [output.detach(), *torch.autograd.grad(output, inputs, above)]


def exact_gelu(x, approximate):
    """Value and slope in float64 without the cancellation of the usual form."""
    x = x.detach().double()
    if approximate == "none":
        bell = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
        below = torch.erfc(-x / 2**0.5) / 2
        return x * below, below + x * bell
    rate = 2 * (2 / torch.pi) ** 0.5
    s = torch.sigmoid(rate * (x + 0.044715 * x**3))
    rest = torch.sigmoid(-rate * (x + 0.044715 * x**3))
    return x * s, s + x * s * rest * rate * (1 + 3 * 0.044715 * x.square())


@C
@FORMS
def test_gelu_is_exact_over_its_whole_range(approximate):
    x = torch.cat([torch.linspace(-14, 14, 200_003), torch.logspace(-30, 1, 1001), -torch.logspace(-30, 1, 1001)])
    x.requires_grad_()
    value, slope = exact_gelu(x, approximate)
    ours = gelu(x, approximate=approximate, impl="c")
    (ours_slope,) = torch.autograd.grad(ours.sum(), x)
    plain = gelu(x, approximate=approximate, impl="reference")
    (plain_slope,) = torch.autograd.grad(plain.sum(), x)
    # The last term is what is left at the clamps, where the tail is next to the smallest number.
    bound = 2 * (plain - value).abs() + 4 * EPS * value.abs() + 1e-35
    assert ((ours - value).abs() <= bound).all()
    assert ((ours_slope - slope).abs() <= 2 * (plain_slope - slope).abs() + 4 * EPS).all()
    # Relative digits in the tail too, which the usual form does not have: only the exponent is rounded.
    tail = (x < -1) & (x > -9)
    exponent = (1 + (value / x).abs().log().abs())[tail]
    assert ((ours / value - 1).abs()[tail] <= 8 * EPS * exponent).all()


@C
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_of_huge_numbers_infinities_and_nan(approximate, dtype):
    x = torch.tensor([float("inf"), 3e38, 1e20, 100, -100, -1e20, -3e38, float("-inf"), float("nan")], dtype=dtype)
    x.requires_grad_()
    y = gelu(x, approximate=approximate, impl="c")
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y[:4], x[:4])
    assert y[4:8].abs().max() < 1e-35
    assert torch.equal(slope[:4], torch.ones(4, dtype=dtype))
    assert slope[4:8].abs().max() < 1e-34
    assert y[8].isnan()
    assert slope[8].isnan()


@C
@FORMS
@pytest.mark.parametrize("size", [0, 1, 2, 33, 4095, 4097, 8193])
def test_bfloat16_gelu_is_the_float32_one_rounded_whatever_the_size(approximate, size):
    x = (4 * random(size, grad=False)).bfloat16()
    expected = gelu(x.float(), approximate=approximate, impl="c").bfloat16()
    assert torch.equal(gelu(x, approximate=approximate, impl="c"), expected)


def test_gelu_refuses_a_form_that_it_does_not_know(no_shape_checks):
    for impl in ("auto", "reference"):
        with pytest.raises((ValueError, RuntimeError), match="approximate"):
            gelu(torch.zeros(2, 3, 4), approximate="sigmoid", impl=impl)


@C
@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(op, dtype):
    inputs, threads = big(op, dtype), torch.get_num_threads()
    try:
        runs = []
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            runs.append(everything(op, inputs, "c"))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@C
@EACH
def test_a_batch_item_has_the_same_bits_alone(op):
    inputs = big(op)
    whole = everything(op, inputs, "c")
    output = op(*(x[2:3] for x in inputs), impl="c")
    assert torch.equal(output, whole[0][2:3])
    above = random(*whole[0].shape, seed=9, grad=False)[2:3]
    alone = [x.detach()[2:3].requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(op(*alone, impl="c"), alone, above)
    assert all(torch.equal(a, w[2:3]) for a, w in zip(gradients, whole[1:], strict=True))


@C
@EACH
def test_any_layout_is_taken(op):
    inputs = [x.detach() for x in big(op)]
    odd = [torch.stack([x, -x], dim=-1)[..., 0].requires_grad_() for x in inputs]
    assert not odd[0].is_contiguous()
    for a, b in zip(everything(op, odd, "c"), everything(op, [x.requires_grad_() for x in inputs], "c"), strict=True):
        assert torch.equal(a, b)


@C
@pytest.mark.parametrize("op", [adaln, gated_add], ids=lambda op: op.name)
@pytest.mark.parametrize("expanded", [False, True])
def test_one_modulation_for_all_gets_the_gradients_of_all(op, expanded):
    inputs = list(big(op))
    shared = (1, 2) if op is adaln else (1,)
    for i in shared:
        inputs[i] = random(1, 1, 384, seed=20 + i)
    args = [x.expand(4, 1, 384) if i in shared and expanded else x for i, x in enumerate(inputs)]
    above = random(*inputs[0].shape, seed=9, grad=False)
    ours = torch.autograd.grad(op(*args, impl="c"), inputs, above)
    plain = torch.autograd.grad(op(*args, impl="reference"), inputs, above)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@C
@EACH
def test_gradients_have_gradients(op):
    inputs = op.example(5, torch.float32)
    found = []
    for impl in ("c", "reference"):
        output = op(*inputs, impl=impl)
        first = torch.autograd.grad(output.pow(2).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


def test_adaln_has_autocasts_type_under_autocast_and_gradients_in_those_of_the_inputs():
    x, shift, scale = big(adaln)
    modulation = shift.bfloat16(), scale.bfloat16()  # as a linear layer under autocast makes them
    with torch.autocast("cpu", torch.bfloat16):
        for impl in ("auto", "reference"):
            y = adaln(x, *modulation, impl=impl)
            assert y.dtype == torch.bfloat16
            assert [g.dtype for g in torch.autograd.grad(y.sum(), [x, shift, scale])] == [torch.float32] * 3
        exact = adaln(x.double(), *(m.double() for m in modulation))
    assert exact.dtype == torch.float64
    ours = adaln(x, *modulation)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert (y.double() - exact).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_a_wide_residual_stream_stays_wide_when_a_narrow_branch_is_added():
    x, gate, branch = big(gated_add)
    y = gated_add(x, gate.bfloat16(), branch.bfloat16())
    assert y.dtype == torch.float32
    expected = x.double() + gate.bfloat16().double() * branch.bfloat16().double()
    torch.testing.assert_close(y.double(), expected, rtol=4 * EPS, atol=4 * EPS)
    assert gated_add(x.bfloat16(), gate, branch).dtype == torch.bfloat16


@C
def test_large_common_offsets_do_not_harm_the_norm():
    x, shift, scale = (t.detach() for t in big(adaln))
    x = x + 1000
    exact = adaln(x.double(), shift.double(), scale.double())
    ours, plain = adaln(x, shift, scale, impl="c"), adaln(x, shift, scale, impl="reference")
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 4 * EPS * exact.abs().max()


def test_the_weight_and_bias_of_a_norm_fold_into_shift_and_scale():
    x, shift, scale = (t.detach().double() for t in big(adaln))
    weight, bias = random(384, dtype=torch.float64, grad=False), random(384, dtype=torch.float64, seed=5, grad=False)
    expected = F.layer_norm(x, (384,), weight, bias, 1e-5) * (1 + scale) + shift
    torch.testing.assert_close(adaln(x, *fold_affine(shift, scale, weight, bias), eps=1e-5), expected)
    assert all(t.dtype == torch.float32 for t in fold_affine(*(t.bfloat16() for t in (shift, scale, weight, bias))))


@EACH
def test_what_the_c_form_cannot_take_goes_to_the_plain_one(op):
    inputs = [x.detach() for x in big(op)]
    assert "float64" in op.refuses("c", tuple(x.double() for x in inputs))
    assert "float16" in op.refuses("c", tuple(x.half() for x in inputs))
    assert "meta" in op.refuses("c", tuple(x.to("meta") for x in inputs))
    assert op(*(x.double() for x in inputs)).dtype == torch.float64
    assert op(*(x.half() for x in inputs)).dtype == torch.float16
    assert op(*(x.to("meta") for x in inputs)).is_meta
    by_row = torch.func.vmap(lambda *row: op(*(r[None] for r in row))[0])(*inputs)
    torch.testing.assert_close(by_row, op(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [adaln, gated_add], ids=lambda op: op.name)
def test_modulations_of_other_shapes_are_refused_by_the_c_form(op):
    x, *others = (x.detach() for x in big(op))
    assert "shapes" in op.refuses("c", (x, others[0].expand_as(x), others[1]))
    assert "shapes" in op.refuses("c", (x[0], *others))


@EACH
def test_without_a_compiler_the_plain_form_runs(op, monkeypatch):
    monkeypatch.setattr("smalti.ops.pointwise.unavailable", lambda: "there is no C compiler")
    inputs = big(op)
    assert op.choice(*inputs) == "reference"
    with force("reference"):
        expected = everything(op, inputs)
    assert all(torch.equal(a, b) for a, b in zip(everything(op, inputs), expected, strict=True))
    with pytest.raises(ValueError, match="no C compiler"):
        op(*inputs, impl="c")


def test_python_and_c_agree_on_the_size_of_a_block():
    assert re.search(r"#define ROWS (\d+)", SOURCE.read_text())[1] == str(ROWS)
