"""The failure table of docs/reliability.md and the tests that carry its mark are the same list."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (?P<fault>[^|]+) \| (?P<bar>[^|]+) \| (?P<tests>[^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows():
    found = [match for match in ROW.finditer(PAGE.read_text()) if match["fault"] not in ("fault", "---")]
    return [pytest.param(match["tests"], id=match["fault"]) for match in found]


def marked(path):
    """Names of the tests of a file, and which of them carry the mark `faults`, by themselves or through their file."""
    tree = ast.parse((ROOT / path).read_text())
    assigned = [node.value for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
    whole_file = any("mark.faults" in ast.unparse(value) for value in assigned)
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {t.name: whole_file or any("mark.faults" in ast.unparse(d) for d in t.decorator_list) for t in tests}


@pytest.mark.parametrize("tests", rows())
def test_every_row_names_tests_that_exist_and_carry_the_mark(tests):
    named = TEST.findall(tests)
    assert named
    assert TEST.sub("", tests).strip() == ""
    for path, name in named:
        assert marked(path).get(name) is True, f"{path}::{name}"


def test_the_table_has_the_rows_that_it_is_about():
    assert len(rows()) >= 35
    faults = " ".join(str(row.id) for row in rows())
    for word in (
        "kill",
        "power",
        "ENOSPC",
        "flipped",
        "pickle",
        "safetensors",
        "bomb",
        "spike",
        "tar",
        "SIGTERM",
        "log",
    ):
        assert word in faults


def test_every_file_with_a_marked_test_is_in_the_table():
    named = {path for path, _ in TEST.findall(PAGE.read_text())}
    carrying = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if any(marked(path).values())
    }
    assert carrying - named == set()


def test_the_mark_is_seen_on_a_test_and_on_a_file(tmp_path):
    decorated, whole = tmp_path / "a.py", tmp_path / "b.py"
    decorated.write_text("@pytest.mark.faults\ndef test_a(): ...\n\ndef test_b(): ...\n")
    whole.write_text("pytestmark = [pytest.mark.slow, pytest.mark.faults]\n\ndef test_a(): ...\n")
    assert marked(decorated) == {"test_a": True, "test_b": False}
    assert marked(whole) == {"test_a": True}
