"""Versions below which a dependency is known to do harm with a file that means harm."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "torch": (2, 11),  # up to 2.10.0 reading with weights_only could corrupt memory (PYSEC-2026-139)
    "pillow": (12, 3),  # before, some formats could be unpacked without bound (CVE-2026-40192 and others of that year)
}

pytestmark = pytest.mark.faults


def required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pairs = (line.partition(">=") for line in project["dependencies"])
    return {name.strip(): tuple(map(int, version.split(";")[0].split("."))) for name, _, version in pairs}


@pytest.mark.parametrize("name", FLOORS)
def test_a_dependency_that_reads_strangers_files_is_recent_enough(name):
    assert required()[name] >= FLOORS[name]


def test_every_dependency_has_a_floor():
    assert all(required().values())
