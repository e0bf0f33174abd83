"""What kill_loop.py saw of writers that are killed and of processes that want the same folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture
def seen(tmp_path):
    def watch(part, count):
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(HERE / "kill_loop.py"), str(tmp_path), part, str(count)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return watch


def test_kills_at_random_moments_lose_tear_and_spoil_nothing(seen, how_often):
    kills = how_often(40, 200)
    found = seen("store", kills)
    assert found.pop("saves") >= kills // 2
    assert found == {"kills": kills} | dict.fromkeys(["unreadable", "torn", "lost", "leftovers"], 0)


def test_a_second_process_is_refused_by_name_and_a_killed_holder_frees_the_folder(seen, how_often):
    rounds = how_often(10, 50)
    assert seen("lock", rounds) == dict.fromkeys(["rounds", "refused", "named", "freed", "one of two"], rounds)
