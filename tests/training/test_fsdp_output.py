"""What no number shows of a sharded network: it returns no view, of which PyTorch would warn in every process of every
run, and its gradients are exchanged when they should be."""

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


@pytest.mark.parametrize("reshard", [True, False])
def test_gradients_are_exchanged_after_every_part_where_whole_ones_would_take_memory_until_the_last(
    reshard, two_processes, monkeypatch
):
    network = create_model("dit-emoji32", sample_size=8, **NETWORKS["dit-emoji32"])
    config = ParallelConfig(strategy="fsdp", reshard=reshard)
    engine = Parallel.prepare(config, two_processes, torch.device("cpu"), "fp32").trained(network)
    exchanged, ended = [], []
    monkeypatch.setattr(network, "set_requires_gradient_sync", exchanged.append)
    monkeypatch.setattr(network, "set_is_last_backward", ended.append)
    for last in (False, False, True):
        with engine.micro_batch(last=last):
            pass
    assert exchanged == ([True, True, True] if reshard else [False, False, True])
    assert ended == [False, False, True]
