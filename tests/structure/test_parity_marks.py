"""Where we repeat an oddity of released code, a mark says so, a line in docs/parity.md explains, a test holds it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "parity.md").read_text()


def marks():
    """Every mark with the files that carry it."""
    found = {}
    for path in sorted((ROOT / "smalti").rglob("*.py")):
        for line in path.read_text().splitlines():
            if "PARITY" in line:
                match = re.search(r"# PARITY: ([a-z0-9-]+)\. \S", line)
                assert match, f"{path.relative_to(ROOT)}: expected '# PARITY: name-of-mark. Why.', got {line.strip()!r}"
                found.setdefault(match[1], []).append(str(path.relative_to(ROOT)))
    return found


def rows():
    """Cells of each row of the table: mark, what, where, test."""
    lines = [line for line in DOCUMENT.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_marks_in_the_code_are_those_of_the_document():
    documented = [row[0] for row in rows()]
    assert len(documented) == len(set(documented))
    assert set(documented) == set(marks())


def test_each_mark_stands_in_one_place():
    assert {mark: files for mark, files in marks().items() if len(files) > 1} == {}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_each_line_names_its_file_and_a_test_that_exists(row):
    mark, what, where, test = row
    assert what
    assert [where.strip("`")] == marks()[mark]
    named = re.findall(r"`(test_\w+\.py)`", test)
    assert named, f"{mark}: no test file named in {test!r}"
    for name in named:
        assert list((ROOT / "tests").rglob(name)), f"{mark}: there is no {name}"
    for word in re.findall(r"`(\w+)`(?!\.)", test):
        text = "".join(path.read_text() for name in named for path in (ROOT / "tests").rglob(name))
        assert word in text or (ROOT / "tests" / "data" / "parity" / f"{word}.safetensors").exists(), (mark, word)
