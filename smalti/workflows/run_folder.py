"""What a run folder says of its run: settings as asked for, network and data as they came to be."""

import uuid
from pathlib import Path
from typing import Any

import yaml

from smalti.config import from_dict, to_dict
from smalti.data.image_set import Catalogue
from smalti.errors import CheckpointError, ConfigError
from smalti.models import BackboneConfig
from smalti.report.files import write_text
from smalti.storage.sealed import smalti_version
from smalti.training.config import IDENTITY, INCIDENTAL, RunConfig
from smalti.workflows.out_folder import check_folder, refuse_other_home

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


def write_config(config: RunConfig, catalogue: Catalogue, model: BackboneConfig) -> None:
    """Write down what this run is, after `check_config`."""
    resolved = {
        "run": run_id(config.out) or uuid.uuid4().hex,
        "smalti": smalti_version(),
        "model": to_dict(model),
        "data": {"name": catalogue.name, "fingerprint": catalogue.fingerprint},
    }
    for name, content in ((CONFIG, to_dict(config)), (RESOLVED, resolved)):
        write_text(config.out / name, yaml.safe_dump(content, sort_keys=False))


def check_run_folder(config: RunConfig) -> None:
    """Refuse a place that cannot be a run folder, before anything is left there.

    Raises:
        ConfigError: it is a file, a URL, the home of something else, or of the images. StorageError: as `check_folder`.
    """
    check_folder(config.out, "--out")
    refuse_other_home(config.out, "--out", RESOLVED, config.data.path)


def run_id(folder: Path) -> str | None:
    """What the checkpoints of this run call it; None before its first start."""
    path = folder / RESOLVED
    found: str | None = yaml.safe_load(path.read_text()).get("run") if path.exists() else None
    return found


def check_config(config: RunConfig, catalogue: Catalogue) -> list[str]:
    """Refuse to continue another run; nothing is written.

    Returns:
        Settings that differ from those of the last start but do not make another run, as "name: before -> now".

    Raises:
        ConfigError: the folder holds a run of other settings. CheckpointError: of other images.
    """
    path, identity = config.out / CONFIG, config.out / RESOLVED
    changed: dict[str, str] = {}
    if path.exists():
        before = _last_config(config.out)
        changed = changes(before, config)
        other = [
            f"{name}: {text}"
            for name, text in changed.items()
            if name.partition(".")[0] in IDENTITY and name not in INCIDENTAL
        ]
        if other:
            raise ConfigError(f"{config.out} holds another run ({'; '.join(other)}); choose another --out")
    if identity.exists() and yaml.safe_load(identity.read_text())["data"]["fingerprint"] != catalogue.fingerprint:
        raise CheckpointError(
            f"{config.out} was trained on other examples than {config.data.path} holds now; choose another --out"
        )
    return [f"{name}: {text}" for name, text in changed.items()]


def _last_config(folder: Path) -> RunConfig:
    """Settings of the last start; those of a newer smalti may be more than this one knows."""
    try:
        return load_config(folder / CONFIG)
    except ConfigError as error:
        resolved = folder / RESOLVED
        writer = yaml.safe_load(resolved.read_text()).get("smalti") if resolved.exists() else None
        raise ConfigError(f"{error}{told_version(writer)}") from error


def told_version(writer: str | None) -> str:
    """The rest of a sentence about what cannot be read, if it is another smalti's. None = an early one."""
    now = smalti_version()
    return "" if writer in (None, now) else f"; it was written by smalti {writer}, and this is {now}: use that version"


def changes(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Settings that differ, as `data.flip`, but for where the run lies."""
    old, new = _flat(to_dict(before)), _flat(to_dict(now))
    return {name: f"{old.get(name)} -> {new[name]}" for name in new if name != "out" and old.get(name) != new[name]}


def _flat(settings: dict[str, Any], head: str = "") -> dict[str, Any]:
    """Nested settings in one table, under the names of their flags."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{head}{name}.") if isinstance(value, dict) else {f"{head}{name}": value}
    return flat
