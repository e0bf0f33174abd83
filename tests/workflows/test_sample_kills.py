"""What sample_kill_loop.py saw: kill -9 of sampling workers loses no image, makes none twice, and changes no byte."""

import json
from pathlib import Path

import pytest
from processes import output_of

HERE = Path(__file__).parent


def killed(folder, kills):
    return json.loads(output_of(HERE / "sample_kill_loop.py", folder, kills))


def check(found, kills):
    assert found["orphans"] == {"held": True, "freed": True}
    assert found["npz"]["kills"] + found["both"]["kills"] >= kills
    for name, images in (("npz", 5000), ("both", 250)):
        tally = found[name]
        assert tally["distinct"] == images  # else a duplicate could not be seen
        none = dict.fromkeys(["lost", "duplicated", "corrupt", "made twice"], 0)
        assert {key: tally[key] for key in none} == none
        assert tally["unexpected"] == []
        assert tally["npz identical"] == tally["folder identical"] == tally["trials"] > 0
    assert all(found["npz"]["worlds"][world] for world in "123")


@pytest.mark.slow
def test_kills_at_random_moments_lose_no_image_make_none_twice_and_change_no_byte(tmp_path):
    check(killed(tmp_path, 10), 10)


@pytest.mark.long
def test_50_kills_over_5000_images_with_1_2_and_3_processes(tmp_path):
    found = killed(tmp_path, 50)
    check(found, 50)
    assert found["npz"]["while finishing"] + found["both"]["while finishing"] > 0
