"""Attention: a small case by hand, and its laws."""

import math

import pytest
import torch

from smalti.ops import attention
from smalti.ops.attention import MATMUL_TOKENS

pytestmark = pytest.mark.usefixtures("deterministic")

IMPLEMENTATIONS = ["reference", "matmul", "sdpa"]


def qkv(tokens, others=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    lengths = (tokens, others or tokens, others or tokens)
    return [torch.randn(2, 3, n, 8, generator=generator, dtype=dtype, requires_grad=True) for n in lengths]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_tokens_worked_out_by_hand(impl):
    # E = 4, so scores are halved: q.k / 2 = [[log 3, 0], [0, 0]]; weights [[3/4, 1/4], [1/2, 1/2]].
    q = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64).view(1, 1, 2, 4).requires_grad_()
    k = torch.tensor([[math.log(3), 0, 0, 0], [0, 5.0, 0, 0]], dtype=torch.float64).view(1, 1, 2, 4)
    v = torch.tensor([[4.0, 0, 0, 1], [8.0, 0, 2, 1]], dtype=torch.float64).view(1, 1, 2, 4)
    expected = torch.tensor([[5.0, 0, 0.5, 1], [6.0, 0, 1, 1]], dtype=torch.float64).view(1, 1, 2, 4)
    torch.testing.assert_close(attention(q, k, v, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tokens_in_another_order_give_the_answers_in_that_order(impl):
    q, k, v = qkv(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = attention(q[:, :, order], k[:, :, order], v[:, :, order], impl=impl)
    torch.testing.assert_close(shuffled, attention(q, k, v, impl=impl)[:, :, order])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_order_of_keys_with_their_values_does_not_matter(impl):
    q, k, v = qkv(4, 9)
    torch.testing.assert_close(attention(q, k.flip(2), v.flip(2), impl=impl), attention(q, k, v, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_constant_values_come_back_as_they_are(impl):
    q, k, _ = qkv(7)
    v = torch.full_like(q, 2.5)
    torch.testing.assert_close(attention(q, k, v, impl=impl), v)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_zero_queries_give_the_mean_of_the_values(impl):
    q, k, v = qkv(4, 6)
    expected = v.mean(dim=2, keepdim=True).expand(-1, -1, 4, -1)
    torch.testing.assert_close(attention((0 * q), k, v, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_key_answers_everything(impl):
    q, k, v = qkv(5, 1)
    torch.testing.assert_close(attention(q, k, v, impl=impl), v.expand(-1, -1, 5, -1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_adding_one_vector_to_all_keys_changes_nothing(impl):
    q, k, v = qkv(6)
    torch.testing.assert_close(attention(q, k + k[:, :, :1], v, impl=impl), attention(q, k, v, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_very_large_scores_do_not_overflow(impl):
    q, k, v = (x.float() for x in qkv(6))
    assert attention(1e4 * q, 1e4 * k, v, impl=impl).isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_heads_do_not_see_each_other(impl):
    q, k, v = qkv(5)
    changed = torch.cat([k[:, :1], k[:, 1:] + 1000], dim=1)
    torch.testing.assert_close(attention(q, changed, v, impl=impl)[:, 0], attention(q, k, v, impl=impl)[:, 0])


def test_head_sizes_of_the_presets_keep_rule_five():
    # Head size 72 (XL) has a scale that is no power of two: folding it into bfloat16 queries rounds them once more.
    for head_size in (48, 64, 72):
        q, k, v = attention.example(64, torch.bfloat16, seed=1, head_size=head_size)
        exact = attention(*(x.detach().double() for x in (q, k, v)), impl="reference")
        wrong = {impl: (attention(q, k, v, impl=impl).double() - exact).abs().max() for impl in IMPLEMENTATIONS}
        rounding = 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert wrong["matmul"] <= 2 * wrong["reference"] + rounding
        assert wrong["sdpa"] <= 2 * wrong["reference"] + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_short_training_on_a_cpu_takes_the_products_and_everything_else_the_fused_kernel(dtype):
    limit = MATMUL_TOKENS[torch.float32 if dtype == torch.float64 else dtype]
    short, long = qkv(limit, dtype=dtype), qkv(limit + 1, dtype=dtype)
    assert attention.refuses("matmul", tuple(short)) == ""
    assert "at most" in attention.refuses("matmul", tuple(long))
    assert "training" in attention.refuses("matmul", tuple(x.detach() for x in short))
    with torch.no_grad():
        assert "training" in attention.refuses("matmul", tuple(short))
    assert "CPU" in attention.refuses("matmul", tuple(x.to("meta") for x in short))
    with pytest.raises(ValueError, match=f"{limit + 1} tokens, at most {limit}"):
        attention(*long, impl="matmul")
    for inputs in (long, [x.detach() for x in short]):
        assert torch.equal(attention(*inputs), attention(*inputs, impl="sdpa"))
    assert torch.equal(attention(*short), attention(*short, impl="matmul"))


def test_the_reference_counts_what_the_costs_count():
    # Two products of N M E multiply-adds a head; the fused kernel must not hide them from the counter.
    from torch.utils.flop_counter import FlopCounterMode

    for impl in ("reference", "sdpa"):
        q, k, v = (torch.empty(2, 3, n, 8, device="meta") for n in (5, 7, 7))
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v, impl=impl)
        assert counter.get_total_flops() / 2 == 2 * (2 * 3 * 5 * 7 * 8), impl
