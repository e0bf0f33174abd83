import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """SMALTI_KILLS=200 for the long form."""
    kills = os.environ.get("SMALTI_KILLS", "40")
    folder = tmp_path_factory.mktemp("kill")
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "kill_loop.py"), str(folder), kills, "10"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kills_at_random_moments_lose_tear_and_spoil_nothing(outcome):
    store = outcome["store"]
    assert store["saves"] >= store["kills"] // 2
    assert {k: store[k] for k in ("unreadable", "torn", "lost", "leftovers")} == {
        "unreadable": 0,
        "torn": 0,
        "lost": 0,
        "leftovers": 0,
    }


def test_a_second_process_is_refused_by_name_and_a_killed_holder_frees_the_folder(outcome):
    rounds = outcome["lock"]["rounds"]
    assert outcome["lock"] == {"rounds": rounds, "refused": rounds, "named": rounds, "freed": rounds}
