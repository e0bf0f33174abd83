import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def outcome_of(folder, kills):
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "sharded_loop.py"), str(folder), str(kills)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["told"] == 5, done.stderr
    return outcome


def check(outcome):
    assert outcome["worlds"] == [[0] * size for size in (2, 1, 3, 4, 2)]
    killed = outcome["killed"]
    assert killed["saves"] >= killed["kills"] // 2
    bad = {name: killed[name] for name in ("unreadable", "torn", "lost", "hung", "leftovers", "odd")}
    assert bad == dict.fromkeys(bad, 0)


@pytest.mark.slow
@pytest.mark.faults
def test_real_processes_save_load_and_fail_together_and_a_killed_one_costs_nothing(tmp_path):
    check(outcome_of(tmp_path, 10))


@pytest.mark.long
@pytest.mark.faults
def test_forty_kills_of_random_processes_cost_nothing(tmp_path):
    check(outcome_of(tmp_path, 40))
