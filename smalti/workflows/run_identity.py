"""What a checkpoint says of its run, for one that comes without its run folder: from a mirror, to another disk."""

from collections.abc import Mapping
from typing import Any

from smalti.config import from_dict, to_dict
from smalti.data.image_set import Catalogue
from smalti.errors import CheckpointError, ConfigError
from smalti.storage.sealed import smalti_version
from smalti.training.config import IDENTITY, INCIDENTAL, RunConfig
from smalti.workflows.run_folder import told_version


def identity_of(config: RunConfig, catalogue: Catalogue) -> dict[str, Any]:
    """What makes it this run and no other, in JSON types."""
    return {"settings": _settings(config), "fingerprint": catalogue.fingerprint, "smalti": smalti_version()}


def refuse_another_run(identity: Mapping[str, Any] | None, config: RunConfig, catalogue: Catalogue, where: str) -> None:
    """Do not continue from a checkpoint of another run, such as one that lies in the mirror of a new run folder.

    Args:
        identity: as `identity_of` gave it; None where an older smalti wrote the checkpoint.
        where: the checkpoint, for the message.

    Raises:
        ConfigError: it is of a run of other settings. CheckpointError: of other images.
    """
    if identity is None:
        return
    try:
        before, now = _settings(from_dict(RunConfig, identity.get("settings"), where)), _settings(config)
    except ConfigError as error:
        raise ConfigError(f"{error}{told_version(identity.get('smalti'))}") from error
    other = [f"{name}: {before[name]} -> {value}" for name, value in now.items() if before[name] != value]
    if other:
        raise ConfigError(f"{where} is of another run ({'; '.join(other)}); choose another --out and store.mirror")
    if identity["fingerprint"] != catalogue.fingerprint:
        raise CheckpointError(
            f"{where} was trained on other examples than {config.data.path} holds now; choose another --out and "
            "store.mirror"
        )


def _settings(config: RunConfig) -> dict[str, Any]:
    settings = to_dict(config)
    for name in INCIDENTAL:
        group, _, part = name.partition(".")
        settings[group] = {key: value for key, value in settings[group].items() if key != part}
    return {name: settings[name] for name in IDENTITY}
