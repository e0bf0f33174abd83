"""Files made to do harm are refused quickly and in little memory."""

import json
from pathlib import Path

import pytest
from processes import output_of

HERE = Path(__file__).parent
MIB = 1 << 20

pytestmark = pytest.mark.faults


def test_crafted_headers_and_bombs_are_refused_in_little_time_and_memory(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak of a process's memory since a moment")
    found = json.loads(output_of(HERE / "crafted_loop.py", HERE.parent / "checkpoints", tmp_path))
    headers = {name: seen for name, seen in found.items() if name.startswith("header-")}
    bombs = {name: seen for name, seen in found.items() if name not in headers}
    assert len(headers) >= 15
    assert sorted(bombs) == ["blown.pt", "members.pt", "packed.pt", "tensors.safetensors"]
    for group, seconds, grown in ((headers, 0.1, 64 * MIB), (bombs, 1.0, 100 * MIB)):
        for name, seen in group.items():
            assert seen["said"], f"{name} was not refused"
            assert seen["seconds"] < seconds, (name, seen)
            assert seen["grew"] < grown, (name, seen)
