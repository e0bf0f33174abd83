"""Recipes: the papers' full-scale trainings as settings that run, and settings from a file or a recipe's name.

A recipe is a YAML file of the package: what it trains on, what differs from its source and what that leaves open under
`about`, then settings as in any run's file, each with where it is from.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from smalti.config import did_you_mean, from_dict
from smalti.errors import ConfigError, DataError
from smalti.models import BackboneConfig
from smalti.presets import parse_overrides, preset_config
from smalti.training.config import RunConfig

FOLDER = Path(__file__).parents[1] / "presets" / "recipes"
_SUFFIX = ".yaml"


@dataclass(frozen=True, kw_only=True)
class About:
    """What stands beside the settings.

    Args:
        title: network and data.
        source: paper and code.
        data: what it trains on, and how that is made.
        differs: where paper, released code and this recipe are not the same, and which was chosen.
    """

    title: str
    source: str
    data: str
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A published training.

    Args:
        unknown: settings that the source does not state, as dotted names, and what stands in their place.
    """

    name: str
    path: Path
    about: About
    unknown: dict[str, str]
    config: RunConfig

    @property
    def network(self) -> BackboneConfig:
        """What is trained on the data that `about` names."""
        return preset_config(self.config.model, **parse_overrides(self.config.override))


def recipe_names() -> list[str]:
    """All of them, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob(f"*{_SUFFIX}"))


@cache
def find_recipe(name: str) -> Recipe:
    """A recipe by name, in any of the usual spellings.

    Raises:
        ConfigError: there is none; the message suggests the nearest.
    """
    plain = _plain(name)
    if plain not in recipe_names():
        raise ConfigError(f"no recipe {name!r}{did_you_mean(plain, recipe_names())} (`smalti recipes` lists them all)")
    path = FOLDER / f"{plain}{_SUFFIX}"
    about, data = _read(path)
    unknown = about.pop("unknown", {})
    if not isinstance(unknown, dict) or not all(isinstance(part, str) for pair in unknown.items() for part in pair):
        raise ConfigError(f"{path}.about.unknown: expected names of settings, each with a sentence, got {unknown!r}")
    about_read, config = from_dict(About, about, f"{path}.about"), from_dict(RunConfig, data, str(path))
    return Recipe(plain, path, about_read, unknown, config)


def load_settings(where: str) -> RunConfig:
    """A run's settings from a YAML file, or else from the recipe of that name; `about` in a file is for people.

    Raises:
        ConfigError: there is neither, the file is not YAML, or it holds a setting that does not exist.
    """
    path = Path(where)
    if path.exists():
        return from_dict(RunConfig, _read(path)[1], where)
    if _plain(where) not in recipe_names() and (path.suffix.lower() in (".yaml", ".yml") or len(path.parts) > 1):
        raise ConfigError(f"{where} does not exist; give the path of a YAML file with settings, or a recipe's name")
    return find_recipe(where).config


@contextmanager
def told_of_data(config: RunConfig) -> Iterator[None]:
    """Where the data of a recipe are not there, the error says how they are made."""
    try:
        yield
    except DataError as error:
        path = config.data.path
        using = [recipe for recipe in map(find_recipe, recipe_names()) if recipe.config.data.path == path]
        if not using or Path(path).exists():
            raise
        name = next((recipe.name for recipe in using if recipe.config.model == config.model), using[0].name)
        raise DataError(
            f"{error}; `smalti recipes {name}` says how its data are made, and --data.path where they are instead"
        ) from error


def _plain(name: str) -> str:
    return re.sub(r"[/_ ]", "-", name.lower())


def recipe_lines(pattern: str) -> Iterator[str]:
    """A table of the recipes that match; or, of a pattern that is a name, its file, to be changed and kept.

    Raises:
        ConfigError: none matches.
    """
    if pattern in recipe_names():
        yield from find_recipe(pattern).path.read_text(encoding="utf-8").splitlines()
        return
    matching = [name for name in recipe_names() if Path(name).match(pattern)]
    if not matching:
        raise ConfigError(f"no recipe matches {pattern!r}{did_you_mean(pattern, recipe_names())}")
    rows = [("recipe", "steps", "batch", "", "not published", "source")]
    for recipe in map(find_recipe, matching):
        c = recipe.config
        source = re.sub(r"(arXiv:[\d.]+\d).*", r"\1", recipe.about.source)
        missing = f"{len(recipe.unknown)} settings" if len(recipe.unknown) > 2 else ", ".join(recipe.unknown)
        rows.append((recipe.name, f"{c.steps:,}", str(c.batch_size), c.precision, missing, source))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        padded = zip(row, "<>><<<", widths, strict=True)
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in padded).rstrip()
    yield ""
    yield "`smalti train --config RECIPE --data.path DATA` runs one; `smalti recipes RECIPE` prints its file, with what"
    yield "differs from its source and what that leaves open; `smalti plan --config RECIPE` says what it needs."


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`about`, and the settings."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a table of settings, got {data!r}")
    about = data.pop("about", {})
    if not isinstance(about, dict):
        raise ConfigError(f"{path}.about: expected a table, got {about!r}")
    return about, data
