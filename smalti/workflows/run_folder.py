"""What a run folder says of its run: settings as asked for, network and data as they came to be."""

from pathlib import Path

import yaml

from smalti.config import from_dict, to_dict
from smalti.data import ImageSet
from smalti.errors import CheckpointError, ConfigError
from smalti.models import BackboneConfig
from smalti.report.files import write_text
from smalti.training.config import IDENTITY, RunConfig

CONFIG, RESOLVED = "config.yaml", "resolved.yaml"


def load_config(path: Path) -> RunConfig:
    """A run's settings from YAML, strictly.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds a setting that does not exist.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a YAML file with settings") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from error
    return from_dict(RunConfig, data if data is not None else {}, str(path))


def settle_config(config: RunConfig, images: ImageSet, model: BackboneConfig) -> list[str]:
    """Refuse to continue another run; then write down what this one is.

    Returns:
        Settings that differ from those of the last start but do not make another run, as "name: before -> now".

    Raises:
        ConfigError: the folder holds a run of other settings. CheckpointError: of other images.
    """
    path, identity = config.out / CONFIG, config.out / RESOLVED
    changed: dict[str, str] = {}
    if path.exists():
        changed = changes(load_config(path), config)
        other = [f"{name}: {text}" for name, text in changed.items() if name in IDENTITY]
        if other:
            raise ConfigError(f"{config.out} holds another run ({'; '.join(other)}); choose another --out")
    resolved = {"model": to_dict(model), "data": {"name": images.name, "fingerprint": images.fingerprint}}
    if identity.exists() and yaml.safe_load(identity.read_text())["data"]["fingerprint"] != images.fingerprint:
        raise CheckpointError(
            f"{config.out} was trained on other images than {config.data.path} holds now; choose another --out"
        )
    for target, content in ((path, to_dict(config)), (identity, resolved)):
        write_text(target, yaml.safe_dump(content, sort_keys=False))
    return [f"{name}: {text}" for name, text in changed.items()]


def changes(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Settings that differ, but for where the run lies."""
    old, new = to_dict(before), to_dict(now)
    return {name: f"{old[name]} -> {new[name]}" for name in new if name != "out" and old[name] != new[name]}
