"""`smalti recipes`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from smalti.workflows.recipes import recipe_lines


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the papers' full-scale trainings, which `smalti train --config NAME` runs; or print the file of one."""

    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """Which ones, as in `'udit-*'`; a name prints its file."""

    def run(self) -> None:
        for line in recipe_lines(self.pattern):
            print(line)
