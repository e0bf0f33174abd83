"""What distributed_loop.py saw: several processes take the steps that one takes, whoever holds what."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import output_of

HERE = Path(__file__).parent
STEPS_IN_FP32 = 2e-5
BF16 = 2.0**-9  # half of the distance between two neighbouring numbers of bfloat16 around one

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return seen(tmp_path_factory.mktemp("short"), "short")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return seen(tmp_path_factory.mktemp("everything"), "everything")


def seen(folder, which):
    return json.loads(output_of(HERE / "distributed_loop.py", folder, which))


def check(found, count):
    """Norms and not only weights: AdamW hides a constant factor, such as that of a sum taken for a mean."""
    assert len(found) == count
    for name, numbers in found.items():
        bf16 = "bf16" in name
        assert numbers["names"], name
        assert numbers["agree"], name
        assert numbers["kept"] == 0, name
        limit = BF16 if bf16 else 1e-5
        for what in ("first norm", "norm", "loss", "validation"):
            assert numbers[what] <= limit, (name, what, numbers[what])
        # In bfloat16, AdamW turns the noise of a gradient near zero into whole steps of 1e-4.
        assert numbers["far"] <= (4 * 2e-4 if bf16 else STEPS_IN_FP32), (name, numbers["far"])


@pytest.mark.faults
def test_two_and_three_processes_take_the_steps_of_one(short):
    check(short, 6)


def test_what_is_gathered_in_bfloat16_is_what_autocast_would_round(short):
    met = short["2 diffussm fsdp-bf16"]["met"]
    wide = {"log_dt", "log_decay", "frequency", "input_vector", "output_vector", "skip"}
    assert {met[f"blocks.0.mixer.{name}"] for name in wide} == {"torch.float32"}
    assert met["conditioning.label.weight"] == "torch.float32"
    products = {name: dtype for name, dtype in met.items() if name.endswith((".out.weight", ".linear.weight"))}
    assert len(products) >= 4
    assert set(products.values()) == {"torch.bfloat16"}
    finer = set(short["2 diffussm fsdp-bf16"]["finer"])
    assert products.keys() <= finer, "gradients are exchanged in float32, whose sums bfloat16 does not hold"


@pytest.mark.long
def test_every_network_and_strategy_takes_the_steps_of_one_process(everything):
    """Four networks, DDP, FSDP and HSDP, uneven and empty shares, float32 and bfloat16, parts and recomputation."""
    check(everything, 27)


SHAPES = """
import sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from smalti.presets import create_model
from smalti.training.config import ParallelConfig
from smalti.training.distributed import Parallel, as_sharded, local_part
from smalti.world import World

dist.init_process_group("fake", store=FakeStore(), rank=300, world_size=512)
with torch.device("meta"):
    network = create_model("dit-xl-2")
names = list(network.state_dict())
total = sum(p.numel() for p in network.parameters())
config = ParallelConfig(strategy=sys.argv[1], shard_size=8 if sys.argv[1] == "hsdp" else None)
shared = Parallel.prepare(config, World(300, 512), torch.device("cpu"), "bf16")
shared.trained(network)
parameters = dict(network.named_parameters())
assert all(as_sharded(p) is not None for p in parameters.values())
assert list(network.state_dict()) == names
print(total, sum(local_part(p).numel() for p in parameters.values()))
"""


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "parts"), [("fsdp", 512), ("hsdp", 8)])
def test_512_processes_share_the_largest_dit_evenly(strategy, parts):
    """Without a process but this one: torch's stand-in for a process group."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHAPES, strategy], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    total, own = map(int, done.stdout.split())
    assert total == 675_129_632
    # Rows are dealt out whole: some of 512 processes have one more than others, and none of the shortest tensors.
    assert own == pytest.approx(total / parts, rel=0.15 if parts == 512 else 0.001)
