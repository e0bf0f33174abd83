"""Planned memory against the peak that CUDA's allocator reports, with real steps of training."""

import gc

import pytest
import torch

from smalti.cost.plan import PlanRequest
from smalti.cost.plan_fit import peak_memory_of
from smalti.cost.plan_step import step_memory, training_inputs, training_loss
from smalti.cost.trial import on_meta
from smalti.models import build_backbone
from smalti.presets import preset_config
from smalti.training import EMA, OptimizerConfig
from smalti.training.distributed import apply_activation_checkpointing
from smalti.training.optim import build_optimizer

WARMUP_BYTES = 64 << 20  # workspaces of libraries, which no plan knows
CASES = [
    ("dit-s-2", 32, "bf16", "none"),
    ("dit-b-2", 32, "bf16", "none"),
    ("dit-b-2", 32, "bf16", "full"),
    ("dit-b-2", 16, "fp32", "none"),
    ("drwkv-s-2", 16, "bf16", "none"),
    ("udit-s", 16, "bf16", "none"),
    ("dit-s-2", 32, "bf16", "selective"),
]


@pytest.mark.parametrize(("name", "batch", "precision", "policy"), CASES)
def test_planned_memory_is_within_a_tenth_of_the_allocators_peak(name, batch, precision, policy, device):
    config = preset_config(name)
    request = PlanRequest(
        network=config, batch_size=batch, precision=precision, activation_checkpointing=policy, device="h200"
    )
    step = step_memory(config, batch, precision=precision, policy=policy, apply_policy=apply_activation_checkpointing)
    planned = peak_memory_of(on_meta(config), request, step)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    network = build_backbone(config).to(device)
    average, optimizer = EMA(network, 0.9), build_optimizer(network, OptimizerConfig())
    apply_activation_checkpointing(network, policy)
    inputs = tuple(None if x is None else x.to(device) for x in training_inputs(config, batch))
    for update in range(3):
        torch.cuda.reset_peak_memory_stats(device)
        training_loss(network, inputs, precision).backward()
        optimizer.step()
        average.update(network, update)
        optimizer.zero_grad()
    torch.cuda.synchronize(device)
    measured = torch.cuda.max_memory_allocated(device) - before
    assert abs(planned - measured) <= 0.1 * measured + WARMUP_BYTES
