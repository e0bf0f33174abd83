"""The optimizer and its learning rate."""

import math

import torch
from torch import nn

from smalti.training.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in one fused pass where the device has it (CPU and CUDA do).

    Weight decay leaves out what a module lists in its class attribute `without_weight_decay`: parameters for which zero
    is no neutral value, as the time constants of a state space.
    """
    spared = {
        id(getattr(module, name)) for module in model.modules() for name in getattr(module, "without_weight_decay", ())
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=fused
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of the step that brings the counter from `step` to `step + 1`: a function of the step alone."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.decay == "constant":
        return config.learning_rate * warmup
    progress = min(1.0, max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.learning_rate * warmup * (1 + math.cos(math.pi * progress)) / 2
