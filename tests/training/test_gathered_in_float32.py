"""bfloat16 with weights in parts, where PyTorch (before 2.13) cannot gather a module in two dtypes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalti.training import distributed
from smalti.training.config import ParallelConfig
from smalti.training.distributed import Parallel
from smalti.world import World

HERE = Path(__file__).parent
BF16 = 2.0**-9  # half of the distance between two neighbouring numbers of bfloat16 around one

STEPS = """
import json, sys
from pathlib import Path
import torch
import distributed_loop as steps
import smalti.training.distributed as distributed
from processes import Crew, begin
begin()
distributed._GROUPS = "_as_before_2_13"
folder = Path(sys.argv[1])
codes = Crew(1, lambda rank: steps.work(rank, {"diffussm": ["bf16"]}, folder), folder / "log").wait()
codes += Crew(2, lambda rank: steps.work(rank, {"diffussm": ["fsdp-bf16"]}, folder), folder / "log").wait()
if any(codes):
    sys.exit("".join(path.read_text() for path in sorted(folder.glob("log-*.txt"))))
one = torch.load(folder / "1-0.pt", weights_only=True)["diffussm bf16"]
two = torch.load(folder / "2-0.pt", weights_only=True)["diffussm fsdp-bf16"]
print(json.dumps({
    "norms": steps.far(two["norms"], one["norms"]),
    "validation": steps.far(two["validation"], one["validation"]),
    "far": max((two["state"][name] - tensor).abs().max().item() for name, tensor in one["state"].items()),
    "met": sorted(set(two["met"].values())),
}))
"""


@pytest.mark.slow
def test_all_is_gathered_in_float32_and_autocast_rounds(tmp_path):
    paths = [str(HERE.parents[1]), str(HERE.parent / "support"), str(HERE), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEPS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["met"] == ["torch.float32"]
    assert found["norms"] <= BF16
    assert found["validation"] <= BF16
    assert found["far"] <= 4 * 2e-4  # AdamW turns the noise of a gradient near zero into whole steps of 1e-4


def test_a_user_is_told_of_it_once_and_only_then(monkeypatch):
    def note(strategy, dtype):
        mesh = object() if strategy == "fsdp" else None
        shared = Parallel(ParallelConfig(), World(0, 2), strategy, torch.device("cpu"), dtype, mesh)
        return shared.note

    assert note("fsdp", torch.bfloat16) == ""
    monkeypatch.setattr(distributed, "_GROUPS", "_as_before_2_13")
    assert "float32" in note("fsdp", torch.bfloat16)
    assert note("fsdp", None) == note("ddp", torch.bfloat16) == ""
