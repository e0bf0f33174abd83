"""Presets: rows of data, one table per backbone, each row with its source and the numbers it should reach."""

import fnmatch
from typing import Any

import torch
from torch import nn

from smalti import config as configs
from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.models import BackboneConfig, build_backbone
from smalti.presets.diffussm import DIFFUSSM
from smalti.presets.dit import DIT
from smalti.presets.drwkv import DRWKV
from smalti.presets.emoji import EMOJI
from smalti.presets.preset import Preset
from smalti.presets.udit import UDIT

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*DIT, *DIFFUSSM, *DRWKV, *UDIT, *EMOJI)}


def find_preset(name: str) -> Preset:
    """A preset by name, in any of the usual spellings: dit-xl-2, dit_xl_2, DiT-XL/2, U-DiT-B.

    Raises:
        ConfigError: there is none; the message suggests the nearest.
    """
    wanted = _letters(name)
    found = next(
        (preset for preset in PRESETS.values() if wanted in (_letters(preset.name), _letters(preset.title))), None
    )
    if found is None:
        raise ConfigError(f"no preset {name!r}{did_you_mean(_plain(name), PRESETS)} (`smalti presets` lists them all)")
    return found


def _letters(name: str) -> str:
    """What all spellings of a name share."""
    return "".join(c for c in name.lower() if c.isalnum())


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace("/", "-")


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets that match a shell-style pattern, such as `dit-*-2` or `U-DiT-*`."""
    wanted = _plain(pattern)
    spellings = {preset.name: (preset.name, _plain(preset.title)) for preset in PRESETS.values()}
    return [name for name, known in spellings.items() if fnmatch.filter(known, wanted)]


def preset_config(name: str, **overrides: Any) -> BackboneConfig:
    """A preset's config with some settings replaced.

    Args:
        overrides: fields of the backbone's config, or of its mixer's (`num_heads`); `sample_size` takes one number
            for a square. Names and types are checked.

    Raises:
        ConfigError: unknown preset, unknown setting, wrong type, or a combination that the backbone refuses.
    """
    config = find_preset(name).config
    if isinstance(overrides.get("sample_size"), int):
        overrides["sample_size"] = (overrides["sample_size"],) * 2
    mixer = getattr(config, "mixer", None)
    if mixer is not None and "mixer" not in overrides:
        own = vars(config)
        for_mixer = {k: overrides.pop(k) for k in list(overrides) if k not in own and k in vars(mixer)}
        overrides["mixer"] = configs.replace(mixer, f"override of {name}'s mixer", **for_mixer)
    return configs.replace(config, f"override of {name}", **overrides)


def create_model(name: str, *, device: str | torch.device | None = None, **overrides: Any) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: of a preset, e.g. `dit-s-2` or `DiT-S/2`.
        device: where it is built; "meta" costs no memory.
        overrides: as `preset_config`, e.g. `in_channels=3, num_classes=9, sample_size=32`.

    Raises:
        ConfigError: as `preset_config`.
    """
    config = preset_config(name, **overrides)
    with torch.device(device if device is not None else torch.get_default_device()):
        return build_backbone(config)


def parse_overrides(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("depth=6", "conditioning=adaln")` as a dict; values are read as YAML.

    Raises:
        ConfigError: a pair is not of the form name=value.
    """
    import yaml

    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ConfigError(f"override {pair!r} is not of the form name=value, e.g. depth=6")
        try:
            parsed[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {pair!r}: the value is not readable") from error
    return parsed


__all__ = [
    "PRESETS",
    "Preset",
    "create_model",
    "find_preset",
    "list_models",
    "parse_overrides",
    "preset_config",
]
