"""Shares of the work cover it once, and rows of several processes come together in order."""

import subprocess
import sys

import pytest
import torch

from smalti.world import World, world

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from smalti.world import world
whole = torch.arange(70, dtype=torch.float32).reshape(35, 2)
with world() as w:
    mine = w.share(35, 16)
    rows = whole[mine.start:mine.stop]
    if sys.argv[1] == "dies" and w.rank == 1:
        sys.exit(3)
    assert w.agree(w.rank == 0)
    found = w.gather({"a": rows, "b": rows[:, :1].double()})
    objects = [{"rank": rank, "text": "ü" * (1000 * rank), "none": None} for rank in range(w.size)]
    assert w.gather_objects(objects[w.rank]) == objects
    assert w.collect_objects(objects[w.rank]) == (objects if w.rank == 0 else None)
    assert w.broadcast_object({"said": w.rank}) == {"said": 0}
    w.barrier(torch.distributed.new_group(backend="gloo"))
    if w.rank == 0:
        assert torch.equal(found["a"], whole) and torch.equal(found["b"], whole[:, :1].double())
        print("whole", w.size)
    else:
        assert found is None
"""


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_shares_cover_everything_once_and_are_cut_at_whole_units(size, count):
    shares = [World(rank, size).share(count, 16) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert all(share.start % 16 == 0 or not share for share in shares)


def test_alone_there_is_nobody_to_ask():
    with world() as alone:
        assert (alone.rank, alone.size) == (0, 1)
        assert alone.gather_objects((1, "a")) == alone.collect_objects([1, "a"]) == [[1, "a"]]
        assert alone.broadcast_object({"a": (1,)}) == {"a": [1]}
        alone.barrier()


def _torchrun(tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_rows_of_three_processes_come_to_the_first_in_order(tmp_path):
    ended = _torchrun(tmp_path, "lives")
    assert ended.returncode == 0, ended.stderr
    assert "whole 3" in ended.stdout


@pytest.mark.slow
def test_a_process_that_ends_early_is_one_line_and_no_wait(tmp_path):
    ended = _torchrun(tmp_path, "dies")
    assert ended.returncode != 0
    assert "waited for another one that ended" in ended.stderr or "exitcode  : 3" in ended.stderr


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    me = World.launched()
    assert (me.rank, me.size, me.local_rank) == (5, 8, 3)
    assert me.device(torch.device("cuda")) == torch.device("cuda", 1)
    assert me.device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert me.device(torch.device("cpu")) == torch.device("cpu")
    assert World().device(torch.device("cuda")) == torch.device("cuda")
