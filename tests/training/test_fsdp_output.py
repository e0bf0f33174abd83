"""What a sharded network returns is no view: PyTorch would warn of it in every process of every run."""

import pytest
import torch
import torch.distributed as dist

from smalti.presets import create_model
from smalti.training.config import ParallelConfig
from smalti.training.distributed import Parallel
from smalti.world import World

NETWORKS = {
    "dit-emoji32": {"patch_size": 1, "depth": 1, "hidden_size": 16, "num_heads": 2},
    "diffussm-emoji32": {"depth": 1, "hidden_size": 16},
    "drwkv-emoji32": {"patch_size": 1, "depth": 3, "hidden_size": 16},
    "udit-emoji32": {"hidden_size": 16, "depth": [1, 0, 1, 0, 1]},
}


@pytest.fixture
def two_processes():
    """A group whose exchanges give back whatever was there; nobody else runs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(0, 2)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_sharded_network_returns_may_be_changed_in_place(name, two_processes):
    network = create_model(name, sample_size=8, **NETWORKS[name])
    shared = Parallel.prepare(ParallelConfig(strategy="fsdp"), two_processes, torch.device("cpu"), "fp32")
    engine = shared.trained(network)
    output = engine.call(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert output.requires_grad
    assert not output._is_view()
