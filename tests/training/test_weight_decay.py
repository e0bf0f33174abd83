"""Weight decay leaves the time constants of state spaces alone."""

import torch

from smalti.models import DiffuSSMConfig, DiTConfig, build_backbone
from smalti.nn.mixers import AttentionConfig, BiSSMConfig
from smalti.training.config import OptimizerConfig
from smalti.training.optim import build_optimizer

SIZES = {"sample_size": (4, 4), "num_classes": 2}


def test_dynamics_of_a_state_space_do_not_decay_and_all_else_does():
    network = build_backbone(DiffuSSMConfig(hidden_size=8, depth=2, mixer=BiSSMConfig(state_size=4), **SIZES))
    optimizer = build_optimizer(network, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        spared = name.rpartition(".")[2] in ("log_dt", "log_decay", "frequency", "input_vector")
        torch.testing.assert_close(p.detach(), before[name] * (1 if spared else 0.95))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, network.parameters()))


def test_a_network_without_state_spaces_has_one_group():
    network = build_backbone(DiTConfig(hidden_size=8, depth=1, mixer=AttentionConfig(num_heads=1), **SIZES))
    optimizer = build_optimizer(network, OptimizerConfig(weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]
