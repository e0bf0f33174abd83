import json
from pathlib import Path

import pytest
from processes import output_of

HERE = Path(__file__).parent


def outcome_of(folder, kills):
    outcome = json.loads(output_of(HERE / "sharded_loop.py", folder, kills))
    assert outcome["told"] == 5
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
