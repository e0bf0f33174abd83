"""The code that a page of the documentation shows, run from top to bottom as a reader would."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def names_of(page):
    """What the blocks marked `python` of a page define; blocks without a mark are fragments and not run."""
    text = (DOCS / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks, f"docs/{page} shows no code"
    found = {"__name__": page}
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), found)
    return found
