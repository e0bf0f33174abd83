"""`smalti presets`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from smalti.workflows.presets import as_json, as_table, preset_rows


@dataclass(frozen=True, kw_only=True)
class Presets:
    """List the networks: parameters and multiply-adds counted on the network, beside what its paper prints."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """Which ones, as in `'dit-*-2'`."""
    json: bool = False
    """One JSON object per line instead of a table."""

    def run(self) -> None:
        rows = preset_rows(self.pattern)
        for line in as_json(rows) if self.json else as_table(rows):
            print(line, flush=True)
