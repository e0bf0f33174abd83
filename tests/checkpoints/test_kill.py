import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, how_often):
    kills, rounds = str(how_often(40, 200)), str(how_often(10, 50))
    folder = tmp_path_factory.mktemp("kill")
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "kill_loop.py"), str(folder), kills, rounds],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.faults
def test_kills_at_random_moments_lose_tear_and_spoil_nothing(outcome):
    store = outcome["store"]
    assert store["saves"] >= store["kills"] // 2
    assert {k: store[k] for k in ("unreadable", "torn", "lost", "leftovers")} == {
        "unreadable": 0,
        "torn": 0,
        "lost": 0,
        "leftovers": 0,
    }


@pytest.mark.faults
def test_a_second_process_is_refused_by_name_and_a_killed_holder_frees_the_folder(outcome):
    rounds = outcome["lock"]["rounds"]
    assert outcome["lock"] == {"rounds": rounds, "refused": rounds, "named": rounds, "freed": rounds}
