"""What ends_loop.py saw: an end in the middle of a save beside the training, of a validation or of a picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def test_an_end_during_a_save_beside_the_training_or_a_look_costs_no_step_and_no_bit(tmp_path, how_often):
    count = how_often(4, 12)
    tests = [HERE.parents[1], HERE.parent / "support", HERE.parent / "workflows"]
    paths = [*map(str, tests), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "ends_loop.py"), str(tmp_path), str(count)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    end = {"code": 0, "end": "finished", "state": True, "log": True}
    assert found["killed"] == dict.fromkeys(["during a save", "killed", "open", "kept"], count) | end
    assert found["stopped"] == dict.fromkeys(["met", "exit 75", "saved at the last step", "marked"], count) | end
