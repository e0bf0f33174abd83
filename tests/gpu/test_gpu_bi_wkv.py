"""Bi-WKV's Triton kernels on CUDA: odd sizes, extremes, several chunks, the same bits, and which twin is chosen."""

import pytest
import torch

from smalti.ops import bi_wkv


def inputs(device, dtype, tokens, channels, *, batch=2, decays=(-5.0, 3.0), keys=1.0, bonus=1.0):
    generator = torch.Generator().manual_seed(tokens + channels)
    decay = torch.linspace(*decays, channels) / tokens
    bonuses = bonus * torch.randn(channels, generator=generator)
    key, value = torch.randn(2, batch, tokens, channels, generator=generator)
    return [x.to(device, dtype).requires_grad_() for x in (decay, bonuses, keys * key, value)]


def results(args, impl):
    args = [x.detach().requires_grad_() for x in args]
    output = bi_wkv(*args, impl=impl)
    above = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = torch.autograd.grad(output, args, above.to(args[3].device, args[3].dtype).to(output.dtype))
    return dict(zip(("output", "decay", "bonus", "key", "value"), [output.detach(), *gradients], strict=True))


def assert_agrees(args, dtype, exponent=0.0):
    exact = results([x.double() for x in args], "reference")
    plain, fast = results(args, "reference"), results(args, "triton")
    largest = max(x.abs().max() for x in exact.values())
    # The tolerance of tests/contract/test_ops.py, but each gradient against its own largest value; and the kernels
    # keep the log of the denominator in float32, where it is rounded like any number as large as the exponents.
    rounding = 4 * torch.finfo(dtype).eps + (2 * args[2].shape[1] + exponent) * torch.finfo(torch.float32).eps
    for name, truth in exact.items():
        scale = truth.abs().max()
        scale = scale if scale > 1e-6 * largest else largest
        error, own = (((x[name].double() - truth).abs().max() / scale).item() for x in (fast, plain))
        assert error <= 2 * own + rounding, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [5, 40, 384])
@pytest.mark.parametrize("tokens", [1, 2, 63, 257, 1024, 1025])
def test_any_number_of_tokens_and_channels_agrees_with_the_reference(device, tokens, channels, dtype):
    assert_agrees(inputs(device, dtype, tokens, channels), dtype)


@pytest.mark.parametrize("tokens", [63, 257, 1025])
@pytest.mark.parametrize(
    ("decays", "keys", "bonus"),
    [((-300.0, 300.0), 20.0, 1.0), ((-300.0, -100.0), 1.0, 1.0), ((-20.0, 20.0), 60.0, 1.0), ((-5.0, 3.0), 20.0, 60.0)],
)
def test_extreme_decay_keys_and_bonus_agree_with_the_reference(device, tokens, decays, keys, bonus):
    args = inputs(device, torch.float32, tokens, 16, decays=decays, keys=keys, bonus=bonus)
    assert_agrees(args, torch.float32, exponent=max(map(abs, decays)) + 4 * keys + 3 * bonus)


@pytest.mark.parametrize("tokens", [256, 3000])
def test_two_calls_give_the_same_bits(device, tokens):
    args = inputs(device, torch.bfloat16, tokens, 384, batch=16)
    first, second = results(args, "triton"), results(args, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cuda_takes_the_kernels_and_float64_does_not(device):
    assert bi_wkv.choice(*inputs(device, torch.bfloat16, 16, 8)) == "triton"
    assert "float64" in bi_wkv.refuses("triton", tuple(inputs(device, torch.float64, 16, 8)))
    assert bi_wkv(*inputs(device, torch.float64, 16, 8)).dtype == torch.float64
