"""What stop_loop.py saw: nothing that stops a run changes what it becomes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = 10  # per run
SAME = {"state": True, "log": True}

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def counts(how_often):
    return {"runs": how_often(2, 20), "stops": how_often(10, 50), "commands": how_often(2, 10)}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, counts):
    folder = tmp_path_factory.mktemp("stop")
    paths = [str(HERE.parents[1]), str(HERE.parent / "support"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "stop_loop.py"), str(folder), *map(str, counts.values())],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def part(found, names):
    return {name: found[name] for name in names}


def test_runs_killed_at_random_moments_end_with_the_bits_of_one_that_was_left_alone(outcome, counts):
    found, runs = outcome["kill"], counts["runs"]
    assert found["kills"] == found["attempts"] == KILLS * runs
    assert part(found, ["ends", "same state", "same log"]) == {"ends": runs, "same state": runs, "same log": runs}


def test_after_every_kill_the_log_is_whole_lines_with_rising_steps(outcome):
    found = outcome["kill"]
    assert found["log in order"] == found["attempts"]


def test_no_kill_costs_or_spoils_a_stored_checkpoint(outcome):
    assert part(outcome["kill"], ["went back", "passed over"]) == {"went back": 0, "passed over": 0}


def test_a_run_asked_to_stop_saves_that_step_and_exits_75(outcome, counts):
    found, stops = outcome["stop"], counts["stops"]
    expected = dict.fromkeys(["stops", "exit 75", "saved at the last step", "named"], stops)
    assert part(found, expected) == expected
    assert found["during a save"] >= 0.8 * (stops // 2)


def test_a_stopped_run_goes_on_with_the_next_step_and_ends_with_the_same_bits(outcome):
    found = outcome["stop"]
    assert part(found, ["lost", "repeated", "code", *SAME]) == {"lost": 0, "repeated": 0, "code": 0} | SAME


def test_a_second_ctrl_c_does_not_wait_for_the_step_and_costs_no_checkpoint(outcome):
    assert outcome["interrupt"] == {
        "waits after the first": True,
        "code": 130,
        "at once": True,
        "said": True,
        "stored": 2,
        "continues": 0,
        "first step then": 3,
    }


def test_the_real_command_killed_and_started_again_ends_with_the_same_bits(outcome, counts):
    found = outcome["command"]
    assert found["codes"] == [-9] * counts["commands"]
    assert part(found, ["code", *SAME]) == {"code": 0} | SAME
    assert "continuing" in found["said"]
