"""What ends_loop.py saw: an end in the middle of a save beside the training, of a validation or of a picture."""

import json
from pathlib import Path

import pytest
from processes import output_of

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def test_an_end_during_a_save_beside_the_training_or_a_look_costs_no_step_and_no_bit(tmp_path, how_often):
    count = how_often(4, 12)
    found = json.loads(output_of(HERE / "ends_loop.py", tmp_path, count))
    end = {"code": 0, "end": "finished", "state": True, "log": True}
    assert found["killed"] == dict.fromkeys(["during a save", "killed", "open", "kept"], count) | end
    assert found["stopped"] == dict.fromkeys(["met", "exit 75", "saved at the last step", "marked"], count) | end
