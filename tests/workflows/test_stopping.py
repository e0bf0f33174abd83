"""What stop_loop.py saw: nothing that stops a run changes what it becomes."""

import json
from pathlib import Path

import pytest
from processes import output_of

HERE = Path(__file__).parent
KILLS = 10  # per run

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.fixture
def seen(tmp_path):
    def watch(part, count=1):
        return json.loads(output_of(HERE / "stop_loop.py", tmp_path, part, count, seconds=560))

    return watch


def test_runs_killed_at_random_moments_lose_nothing_and_end_with_the_bits_of_one_left_alone(seen, how_often):
    """After every kill the log is whole lines with rising steps, and no stored checkpoint is gone or spoiled."""
    runs = how_often(2, 20)
    found = seen("kill", runs)
    found.pop("before the first step")
    kills = dict.fromkeys(["kills", "attempts", "log in order"], KILLS * runs)
    ends = dict.fromkeys(["ends", "same state", "same log"], runs)
    assert found == kills | ends | {"went back": 0, "passed over": 0}


def test_a_run_asked_to_stop_saves_that_step_exits_75_and_goes_on_with_the_next(seen, how_often):
    stops = how_often(10, 50)
    found = seen("stop", stops)
    counts = dict.fromkeys(["stops", "exit 75", "saved at the last step", "named"], stops)
    assert found == counts | {
        "during a save": stops // 2,
        "lost": 0,
        "repeated": 0,
        "code": 0,
        "state": True,
        "log": True,
    }


def test_a_second_ctrl_c_does_not_wait_for_the_step_and_costs_no_checkpoint(seen):
    assert seen("interrupt") == {
        "waits after the first": True,
        "code": 130,
        "at once": True,
        "said": True,
        "stored": 2,
        "continues": 0,
        "first step then": 3,
    }


def test_other_runs_in_the_same_folder_exit_73_and_change_neither_a_file_nor_a_bit_of_the_first(seen, how_often):
    others = how_often(6, 50)
    expected = {"refused": others, "named": others, "wrote": 0, "code": 0, "state": True, "log": True}
    assert seen("second", others) == expected


def test_the_real_command_killed_and_started_again_ends_with_the_same_bits(seen, how_often):
    kills = how_often(2, 10)
    found = seen("command", kills)
    assert "continuing" in found.pop("said")
    assert found == {"codes": [-9] * kills, "code": 0, "state": True, "log": True}
