"""The door of ops: every twin in the table is as exact as its reference, forward and all gradients."""

import inspect

import pytest
import torch

from smalti.ops import OPS, Op, force

pytestmark = pytest.mark.usefixtures("deterministic")

FAST = [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS.values() for name in op.fast]
ALL = [pytest.param(op, id=name) for name, op in OPS.items()]
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [1, 2, 63, 64, 300]
SEEDS = [0, 1, 2]


def run(op, impl, inputs):
    """Output and the gradient of every input, under a random gradient from above."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = op(*inputs, impl=impl)
    above = torch.randn(output.shape, generator=torch.Generator().manual_seed(99)).to(inputs[0].dtype)
    return output.detach(), torch.autograd.grad(output, inputs, above.to(output.dtype))


def error(got, exact, scale):
    # A shift of one token leaves nothing: the scale is 0, and so must the difference be.
    return ((got.double() - exact).abs().max() / scale.clamp_min(torch.finfo(torch.float32).tiny)).item()


@pytest.mark.parametrize(("op", "impl"), FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_twin_is_as_exact_as_the_reference_forward_and_backward(op, impl, dtype, tokens):
    for seed in SEEDS:
        inputs = op.example(tokens, dtype, seed=seed)
        if reason := op.refuses(impl, inputs):
            pytest.skip(reason)
        exact, exact_gradients = run(op, "reference", [x.detach().double() for x in inputs])
        plain, plain_gradients = run(op, "reference", inputs)
        fast, fast_gradients = run(op, impl, inputs)
        # At most twice as wrong as the reference in the same dtype, plus the rounding of the output and that of the
        # twin's own sums, which are kept in float32.
        rounding = 4 * torch.finfo(dtype).eps + 2 * tokens * torch.finfo(torch.float32).eps
        assert fast.dtype == dtype
        scale = exact.abs().max()
        assert error(fast, exact, scale) <= 2 * error(plain, exact, scale) + rounding, seed
        # One scale for all gradients: with one token, attention's queries have none at all.
        scale = max(gradient.abs().max() for gradient in exact_gradients)
        for e, p, f in zip(exact_gradients, plain_gradients, fast_gradients, strict=True):
            assert f.dtype == dtype
            assert error(f, e, scale) <= 2 * error(p, e, scale) + rounding, seed


@pytest.mark.parametrize(("op", "impl"), FAST)
def test_no_twin_is_refused_everywhere(op, impl):
    reasons = [op.refuses(impl, op.example(tokens, dtype)) for tokens in TOKENS for dtype in DTYPES]
    if not any(reason == "" for reason in reasons) and not torch.cuda.is_available():
        assert all("cpu" in reason.lower() or "cuda" in reason.lower() for reason in reasons), reasons
        pytest.skip(f"needs another device: {reasons[0]}")
    assert "" in reasons, reasons


@pytest.mark.parametrize("op", ALL)
def test_twins_take_what_the_reference_takes(op):
    expected = [p.name for p in inspect.signature(op.reference).parameters.values()]
    for name, twin in op.fast.items():
        assert [p.name for p in inspect.signature(twin).parameters.values()] == expected, name


@pytest.mark.parametrize("op", ALL)
def test_examples_are_repeatable_differ_by_seed_and_ask_for_gradients(op):
    for dtype in DTYPES:
        first, again, other = op.example(5, dtype), op.example(5, dtype), op.example(5, dtype, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert all(x.dtype == dtype and x.requires_grad and x.is_leaf for x in first)


@pytest.mark.parametrize("op", ALL)
def test_the_reference_passes_a_numerical_gradient_check(op):
    inputs = [x.detach().double().requires_grad_() for x in op.example(3, torch.float32)]
    assert torch.autograd.gradcheck(lambda *args: op(*args, impl="reference"), inputs, fast_mode=True)


@pytest.mark.parametrize("op", ALL)
def test_rows_of_a_batch_do_not_see_each_other(op):
    inputs = [x.detach() for x in op.example(7, torch.float32)]
    batched = range(len(inputs)) if op.batched is None else op.batched
    for impl in ("auto", "reference"):
        whole = op(*inputs, impl=impl)
        for row in range(2):
            alone = op(*(x[row : row + 1] if i in batched else x for i, x in enumerate(inputs)), impl=impl)
            torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ALL)
def test_every_implementation_leaves_its_inputs_as_they_were(op):
    for impl in ("reference", *op.fast):
        inputs = op.example(4, torch.float32)
        before = [x.detach().clone() for x in inputs]
        if not op.refuses(impl, inputs):
            op(*inputs, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("op", ALL)
def test_entries_are_ops_under_their_own_name(op):
    assert isinstance(op, Op)
    assert OPS[op.name] is op
    assert "reference" not in op.fast
    assert "auto" not in op.fast


@pytest.mark.parametrize("op", ALL)
def test_force_reference_is_the_reference_bit_for_bit(op):
    inputs = op.example(6, torch.float32)
    with force("reference"):
        assert torch.equal(op(*inputs), op.reference(*inputs))
