"""What kill_loop.py saw of writers that are killed and of processes that want the same folder."""

import json
from pathlib import Path

import pytest
from processes import output_of

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture
def seen(tmp_path):
    return lambda part, count: json.loads(output_of(HERE / "kill_loop.py", tmp_path, part, count))


def test_kills_at_random_moments_lose_tear_and_spoil_nothing(seen, how_often):
    kills = how_often(40, 200)
    found = seen("store", kills)
    assert found.pop("saves") >= kills // 2
    assert found == {"kills": kills} | dict.fromkeys(["unreadable", "torn", "lost", "leftovers"], 0)


def test_a_second_process_is_refused_by_name_and_a_killed_holder_frees_the_folder(seen, how_often):
    rounds = how_often(10, 50)
    assert seen("lock", rounds) == dict.fromkeys(["rounds", "refused", "named", "freed", "one of two"], rounds)
