"""A finished model as two files: `model.safetensors` and the `config.json` that says what network they belong to.

Reading runs nothing that a file contains: no pickle, no code, no class names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from smalti.config import from_dict, to_dict
from smalti.errors import CheckpointError, ConfigError
from smalti.models import BackboneConfig, build_backbone
from smalti.models.pretrained import Pretrained
from smalti.storage.filesystem import (
    FileRecord,
    FileSystem,
    LocalFileSystem,
    make_folders,
    read_record,
    require_space,
    storage_errors,
    write_file,
)
from smalti.storage.sealed import check_format, seal, smalti_version, unseal
from smalti.storage.tensors import (
    differences,
    file_pieces,
    file_size,
    read_tensors,
    refuse_non_finite,
    shapes_of,
)

FORMAT, VERSION = "smalti-model", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"

# Durable before the weights change names: if the writer dies between the two renames, this one describes them.
_NEXT_CONFIG, _NEXT_WEIGHTS = ".config.json.next", ".model.safetensors.next"
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Bundle:
    """A model in eval mode, and what was stored with it: diffusion settings, class names, image size."""

    model: nn.Module
    extra: dict[str, Any]


def save_model(
    folder: Path, model: nn.Module, *, extra: Mapping[str, Any] = _NOTHING, fs: FileSystem | None = None
) -> Path:
    """Write a model so that the folder holds, at every moment, the old one whole or the new one whole.

    Args:
        folder: made if missing; other files in it stay.
        model: one that `build_backbone` makes, with its `config`, neither compiled nor wrapped.
        extra: anything JSON can hold; `load_bundle` gives it back.
        fs: the file operations; tests put failures here.

    Raises:
        ConfigError: the model's tensors are not those of its config.
        NumericError: a weight is not finite.
        StorageError: the disk is full or refuses; a model stored before is untouched.
    """
    fs = LocalFileSystem() if fs is None else fs
    folder = Path(folder)
    config = getattr(model, "config", None)
    if not isinstance(config, BackboneConfig):
        raise ConfigError(f"{type(model).__name__} has no backbone config: only backbones of smalti can be saved")
    tensors = model.state_dict()
    if table := differences(shapes_of(_empty(config).state_dict()), shapes_of(tensors)):
        raise ConfigError(f"this {type(model).__name__} is not as its config says (compiled or wrapped?): {table}")
    refuse_non_finite(tensors, f"model for {folder}")
    head = {"format": FORMAT, "version": VERSION, "smalti": smalti_version(), "model": to_dict(config)}
    extra = json.loads(json.dumps(dict(extra)))
    needed = file_size(tensors) + len(seal(head | {"extra": extra})) + 4096
    with storage_errors(fs, folder, needed, "storing the model", "What was stored before is untouched"):
        make_folders(fs, folder)
        for name in (_NEXT_CONFIG, _NEXT_WEIGHTS):
            if (folder / name).exists():
                fs.remove_file(folder / name)
        require_space(fs, folder, needed, "the model")
        record = write_file(fs, folder / _NEXT_WEIGHTS, file_pieces(tensors))
        document = head | {"weights": record._asdict(), "extra": extra}
        write_file(fs, folder / _NEXT_CONFIG, [seal(document)])
        fs.sync_folder(folder)
        fs.rename(folder / _NEXT_WEIGHTS, folder / WEIGHTS)
        fs.sync_folder(folder)
        fs.rename(folder / _NEXT_CONFIG, folder / CONFIG)
        fs.sync_folder(folder)
    return folder


def load_model(path: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The stored model, in eval mode.

    Args:
        path: the folder that `save_model` wrote, or a run folder with such a folder `model` in it.
        dtype: None = as stored.

    Raises:
        CheckpointError: there is no model, it is damaged, of a newer format, or its tensors are not its config's.
    """
    return load_bundle(path).model.to(device=device, dtype=dtype)


def load_bundle(path: Path) -> Bundle:
    """The stored model on the CPU, in eval mode, with what was stored beside it.

    Raises:
        CheckpointError: as `load_model`.
    """
    folder = _find(Path(path))
    try:
        document = _read_document(folder)
        tensors = read_tensors(folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    where = str(folder / CONFIG)
    try:
        model = _empty(from_dict(BackboneConfig, document["model"], "model"))
    except ConfigError as error:
        raise CheckpointError(f"{where} describes no model of this smalti: {error}") from error
    if table := differences(shapes_of(model.state_dict()), shapes_of(tensors)):
        raise CheckpointError(f"{folder / WEIGHTS} holds another model than its {CONFIG} says: {table}")
    model.load_state_dict(tensors, assign=True)
    if isinstance(model, Pretrained):
        model.stored_with = document["extra"]
    return Bundle(model.eval(), document["extra"])


def check_document(path: Path, where: str) -> None:
    """Refuse a `config.json` that describes no model of smalti, before the weights are at hand.

    Raises:
        CheckpointError: it is damaged, of something else, or of a newer format.
    """
    try:
        _read_sealed(path)
    except CheckpointError as error:
        raise CheckpointError(f"{where} holds no model of this smalti: {error}") from error


def _empty(config: BackboneConfig) -> nn.Module:
    """The network without memory: names and shapes only."""
    with torch.device("meta"):
        return build_backbone(config)


def _find(path: Path) -> Path:
    if path.is_file():
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"{path} may be a pickle, which can run any code when it is read: smalti reads safetensors only. For "
                "released weights, see smalti.from_official"
            )
        raise CheckpointError(f"{path} is a file: give the folder that holds {WEIGHTS} and {CONFIG}")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: expected a folder with {WEIGHTS} and {CONFIG}, or a run folder")
    for folder in (path / "model", path):
        here = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
        if len(here) == 2:
            return folder
        if here:
            gone = CONFIG if here == [WEIGHTS] else WEIGHTS
            raise CheckpointError(
                f"{folder} has {here[0]} but no {gone}: both are needed; copy or save the model again"
            )
    inside = sorted(found.parents[1].name for found in path.glob(f"*/model/{WEIGHTS}"))
    advice = f"; it holds runs: name one, as {path / inside[0]} (of {', '.join(inside)})" if inside else ""
    raise CheckpointError(
        f"{path} holds no model: expected {WEIGHTS} and {CONFIG} in it or in its folder 'model'{advice}"
    )


def _read_document(folder: Path) -> dict[str, Any]:
    """The config document that belongs to the weights."""
    where = folder / CONFIG
    document = _read_sealed(where)
    weights = read_record(folder / WEIGHTS)
    if FileRecord(**document["weights"]) == weights:
        return document
    following = folder / _NEXT_CONFIG
    if following.exists():
        document = _read_sealed(following)
        if FileRecord(**document["weights"]) == weights:
            return document
    raise CheckpointError(
        f"{folder / WEIGHTS} is damaged, or from another save than {CONFIG}: its size or sha256 is not the one written "
        "there; copy or save the model again"
    )


def _read_sealed(path: Path) -> dict[str, Any]:
    """Read a `config.json`; any change to it since it was written is an error."""
    data = path.read_bytes()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON document: damaged, or not written by smalti") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format", document.get("_class_name")) if isinstance(document, dict) else None
        raise CheckpointError(f"{path} describes something else than a smalti model (format {found!r})")
    document = unseal(data, str(path))
    check_format(document, FORMAT, VERSION, str(path))
    return document
