"""DiT on CUDA against the same network in float64 on the CPU: output and every gradient."""

import copy

import pytest
import torch

CONDITIONINGS = ["adaln_zero", "adaln", "cross_attention", "in_context"]


def results(model, device, dtype, autocast):
    """Output and gradients of a fixed loss, in float64 on the CPU."""
    model = copy.deepcopy(model).to(device, dtype)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    upstream = torch.randn(3, 6, 16, 16, generator=generator, dtype=torch.float64)
    latents = latents.to(device, dtype).requires_grad_()
    timesteps = torch.tensor([0.0, 500.0, 999.0], device=device)
    labels = torch.tensor([0, 4, 5], device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        output = model(latents, timesteps, labels)
    (output.double() * upstream.to(device)).sum().backward()
    found = {"output": output, "latents": latents.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


def errors(found, exact):
    """Relative error of each tensor in the 2-norm; of gradients that are zero by symmetry, against the largest."""
    assert found.keys() == exact.keys()
    largest = max(tensor.norm() for tensor in exact.values())
    scales = {name: exact[name].norm() for name in exact}
    return {
        name: ((found[name] - exact[name]).norm() / (scale if scale > 1e-12 * largest else largest)).item()
        for name, scale in scales.items()
    }


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_float32_on_cuda_is_float32(make_dit, device, conditioning):
    model = make_dit(conditioning=conditioning)
    exact = results(model, "cpu", torch.float64, autocast=False)
    found = errors(results(model, device, torch.float32, autocast=False), exact)
    # A sum of K products errs by about sqrt(K) eps of its size; there are at most 4 x 96 terms in a sum and 30 such
    # sums in a row on the way forward and back. TensorFloat-32, whose eps is 8192 times larger, is far above it.
    limit = 30 * (4 * 96) ** 0.5 * torch.finfo(torch.float32).eps
    assert limit < 1e-4
    assert {name: error for name, error in found.items() if not error <= limit} == {}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_bfloat16_autocast_on_cuda_is_as_good_as_on_a_cpu(make_dit, device, conditioning):
    model = make_dit(conditioning=conditioning)
    exact = results(model, "cpu", torch.float64, autocast=False)
    cpu = errors(results(model, "cpu", torch.float32, autocast=True), exact)
    cuda = errors(results(model, device, torch.float32, autocast=True), exact)
    # Both round the same inputs of the same products; devices differ in which results between they keep in float32.
    eps = torch.finfo(torch.bfloat16).eps
    assert {name: (cuda[name], cpu[name]) for name in exact if not cuda[name] <= 2 * cpu[name] + eps} == {}


def test_another_latent_size_makes_its_positions_on_the_device(make_dit, device):
    model = make_dit()
    latents = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(3))
    timesteps, labels = torch.tensor([10.0, 700.0]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(latents.double(), timesteps, labels)
        found = model.to(device)(latents.to(device), timesteps.to(device), labels.to(device))
    assert found.device.type == device.type
    assert (found.cpu().double() - expected).norm() / expected.norm() < 1e-4
