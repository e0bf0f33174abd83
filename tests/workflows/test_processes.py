"""What processes_loop.py saw: a run is the same run, however many processes share it and whatever becomes of one."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEPS_IN_FP32 = 2e-5  # how far weights may drift in 20 steps because sums are taken in another order

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def kills(how_often):
    return how_often(3, 10)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, kills):
    """The parts asked for, each run once, also where several workers of pytest ask."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "processes"
    folder.mkdir(exist_ok=True)
    paths = [str(HERE.parents[1]), str(HERE.parent / "support"), str(HERE), os.environ.get("PYTHONPATH", "")]

    def part(name):
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = folder / f"{name}.json"
            if found.exists():
                return json.loads(found.read_text())[name]
            shutil.rmtree(folder / name, ignore_errors=True)  # of a failed try
            done = subprocess.run(
                [sys.executable, "-W", "ignore", str(HERE / "processes_loop.py"), str(folder / name), name, str(kills)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=280,
            )
            assert done.returncode == 0, done.stderr
            found.write_text(done.stdout)
            return json.loads(done.stdout)[name]

    return part


def test_a_run_handed_from_1_to_2_to_3_to_4_to_1_processes_meets_the_same_samples_and_ends_nearly_the_same(outcome):
    """DDP, FSDP and HSDP in turn, of a batch that none of the larger worlds divides."""
    found = outcome("ladder")
    assert found["codes"] == [0] * 17
    assert found["samples"]
    assert found["logged"]
    assert found["losses"] < 1e-5
    assert found["steps"]
    assert found["names"]
    assert found["far"] <= STEPS_IN_FP32


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_when_a_process_is_killed_the_other_ends_within_5_seconds_saying_so_and_the_same_command_goes_on(
    outcome, strategy, kills
):
    found = outcome("killed")[strategy]
    assert found["codes"] == [[75, -9]] * kills
    assert max(found["seconds"]) <= 5
    for k, line in enumerate(found["lines"]):
        assert line.startswith(f"smalti: process {1 - k % 2} of 2 stopped at step")
        assert f"process {k % 2} " in line.partition(": process")[2] or f"process {k % 2} is gone" in line
        assert "the same command continues" in line
    assert found["whole"] == found["end"] == [0, 0]
    assert found["same"]


def test_a_process_that_hangs_is_given_up_in_time_and_named(outcome):
    found = outcome("hung")
    assert found["code"] == 75
    assert found["over"] <= 5
    assert "process 1 was last heard of at step" in found["line"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_by_all(outcome, strategy):
    found = outcome("not_finite")[strategy]
    assert found["skipped"][0] == found["skipped"][1]
    assert [step - 1 for step in found["skipped"][0]] == found["kept"]
    assert len(found["kept"]) == 1
    assert found["finite"]


def test_out_of_memory_before_the_first_step_is_settled_among_the_processes(outcome):
    found = outcome("out_of_memory")["early"]
    assert found["codes"] == [[0, 0]]
    assert found["kept"] == {"asked": None, "micro_batch": 2}
    assert found["far"] == 0


@pytest.mark.parametrize("name", ["late", "late-fsdp"])
def test_out_of_memory_in_a_step_ends_all_and_the_same_command_goes_on_with_smaller_parts(outcome, name):
    found = outcome("out_of_memory")[name]
    assert found["codes"] == [[75, 75], [0, 0]]
    assert all("ran out of memory at step" in line for line in found["lines"])
    assert all("the same command continues" in line for line in found["lines"])
    assert found["kept"] == {"asked": None, "micro_batch": 2}
    assert found["far"] <= 1e-6


def test_a_signal_to_any_process_saves_and_stops_all_at_the_same_step(outcome):
    found = outcome("stopped")
    assert found["codes"] == [75] * 9 + [0] * 3
    assert found["together"]
    assert found["follows"]
    assert found["said"] == [[1, 0, 0]] * 3  # three processes, one message
    assert found["same"]
