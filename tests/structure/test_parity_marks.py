"""The list of repeated oddities in docs/parity.md is the list of marks in the code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_parity_mark_has_a_line_and_every_line_a_mark():
    marks = {
        (match.group(1).strip(), str(path.relative_to(ROOT)))
        for path in (ROOT / "smalti").rglob("*.py")
        for match in re.finditer(r"# PARITY: ([^.,\n]+)", path.read_text(encoding="utf-8"))
    }
    listed = set()
    for line in (ROOT / "docs" / "parity.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[2].startswith("`"):
            listed.add((cells[0], cells[2].strip("`")))
    assert marks == listed
