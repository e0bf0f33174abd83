"""What wired_loop.py saw: parts that are proved by themselves, together behind `smalti train`."""

import json
from pathlib import Path

import pytest
from processes import output_of

HERE = Path(__file__).parent

pytestmark = pytest.mark.long


@pytest.fixture
def outcome(tmp_path):
    """What a part saw; no two tests ask for the same one."""

    def part(name):
        return json.loads(output_of(HERE / "wired_loop.py", tmp_path, name))[name]

    return part


def test_pictures_and_metrics_are_those_of_one_process_however_many_share_the_drawing(outcome):
    found = outcome("shared_looks")
    one = found["one"]
    assert one["drawn"] == [[70, 36]]  # for the metric, and for the picture
    for name, drawn in {
        "ddp": [[32, 32], [38, 4]],
        "ddp3": [[32], [32, 32], [6, 4]],
        "fsdp": [[70, 36], [70, 36]],  # every step of the network is one of all processes
    }.items():
        assert set(found[name]["codes"]) == {0}, name
        assert len(found[name]["digest"]) == 1
        assert found[name]["digest"] == one["digest"], name
        assert found[name]["picture"] == one["picture"], name
        assert found[name]["drawn"] == drawn, name


def test_one_process_looks_through_new_images_first_and_if_one_cannot_read_them_all_say_why(
    outcome,
):
    found = outcome("first_look")
    assert found["order"]["codes"] == [0, 0, 0]
    assert found["order"]["loads"][:2] == ["0 begins", "0 has them"]
    assert len(found["order"]["loads"]) == 6
    for broken in (0, 1):
        ended = found[f"broken{broken}"]
        assert ended["codes"] == [65, 65]
        assert ended["seconds"] < 60  # the patience of a run is ten minutes
        assert all("the disk of one machine is not mounted" in line for line in ended["said"])
        assert f"process {broken} of the run failed" in ended["said"][1 - broken]
        assert ended["mark"] == ["failed", "65", False]


def test_the_run_folder_says_how_each_start_ended_in_one_word(outcome):
    found = outcome("marks")
    assert found == {
        "not finite": [70, "failed", "70", False, ["FAILED"]],
        "stopped": [75, "preempted", None, True, ["PREEMPTED"]],
        "stopped at": ["2", "SIGTERM"],
        "killed": [-9, "open", None, True, []],
        "other settings": [64, "failed", "64", False, ["FAILED"]],
        "no data": [65, "failed", "65", False, ["FAILED"]],
        "finished": [0, "finished", None, False, ["FINISHED"]],
        "two stopped": [75, "preempted", None, True, ["PREEMPTED"]],
        "two finished": [0, "finished", None, False, ["FINISHED"]],
    }


def test_workers_give_the_bits_of_none_and_a_run_continues_with_them(outcome):
    done = {"codes": [0, 0, 0], "same": True}
    assert outcome("workers") == {"shards": done, "latents": done}


def test_a_run_whose_disk_is_lost_ends_as_if_it_never_was_and_no_other_run_goes_on_from_its_mirror(outcome):
    found = outcome("mirrored")
    assert found["codes"] == [0, 0, 0]
    assert found["first"] == 5
    assert found["same"]
    (seed, by_seed), (images, by_images) = (found["refused"][name] for name in ("seed", "images"))
    assert (seed, images) == (64, 65)
    assert "is of another run (seed: 0 -> 3)" in by_seed
    assert "was trained on other examples" in by_images
