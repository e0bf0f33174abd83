"""The disk is full at any moment of a command: one line, and what was stored stands."""

import json
import re
from pathlib import Path

import disks
import pytest
from processes import output_of

HERE = Path(__file__).parent
# Bytes of room, up to where each file in turn is the first that does not fit; the last suffices.
DISK = {
    "train": [0, 12288, 300_000, 500_000, 4096, 20480, 100_000, 600_000, 3_000_000],
    "encode": [0, 300_000, 3_000_000],
    "sample": [0, 200_000, 470_000, 330_000, 3_000_000],
}
# Bytes that a file may have: the log, the tensors of a checkpoint, a chunk or a picture is what exceeds it.
LIMIT = {
    "train": [0, 1200, 50_000, 300, 3000, 90_000, 10_000_000],
    "encode": [0, 60_000, 1000, 10_000_000],
    "sample": [0, 10_000, 1000, 10_000_000],
}
SHORT = 2

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def attempts(root, disk, name, how, amounts):
    said = output_of(HERE / "full_disk_loop.py", root, disk, name, how, *amounts)
    return [json.loads(line) for line in said.splitlines()]


def check(found, out):
    *full, enough = found
    assert enough["code"] == 0
    for seen in full:
        assert seen["code"] == 74, seen
        (line,) = seen["said"]
        assert str(out) in line, seen
        assert re.search(r"[\d,]+ bytes", line), seen
        assert not seen["traceback"], seen
    for seen in found:
        assert (seen["again"], seen["kept"], seen["same"]) == (0, True, True), seen


def chosen(amounts, how_often):
    *less, enough = amounts
    return [str(amount) for amount in [*less[: how_often(SHORT, len(less))], enough]]


@pytest.mark.long
@pytest.mark.parametrize("name", DISK)
def test_whatever_does_not_fit_on_the_disk_is_one_line_and_with_room_the_same_command_goes_on(
    tmp_path, how_often, name
):
    disk = disks.small_disk(tmp_path, "6m")
    try:
        found = attempts(tmp_path, disk.root, name, "disk", chosen(DISK[name], how_often))
        check(found, disk.root / "out")
    finally:
        disk.unmount()


@pytest.mark.parametrize("name", LIMIT)
def test_whatever_file_the_system_refuses_to_grow_is_one_line_and_without_the_limit_the_same_command_goes_on(
    tmp_path, how_often, name
):
    """For everybody, and in the middle of a file."""
    (tmp_path / "small").mkdir()
    check(attempts(tmp_path, tmp_path / "small", name, "limit", chosen(LIMIT[name], how_often)), tmp_path / "small")
