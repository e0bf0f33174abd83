"""Released weights as a smalti model, and back."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smalti.checkpoints.maps import LAYERS, MAPS, Source
from smalti.config import did_you_mean
from smalti.errors import CheckpointError, ConfigError
from smalti.models import BackboneConfig
from smalti.nn.mixers import MixerConfig
from smalti.storage.tensors import differences, shapes_of


def from_official(source: str, state_dict: Mapping[str, Tensor], **hyperparameters: Any) -> nn.Module:
    """Build the network that released weights belong to, and load a copy of them.

    The result is called `model(latents, timesteps, class_labels)`; it drops no labels, in either mode.
    Weights of a single layer become a mixer, called `mixer(tokens, grid)`.

    Args:
        source: where the weights come from: a key of MAPS or LAYERS, such as "facebookresearch/DiT".
        state_dict: tensors under their released names, in any floating dtype, which the model takes over.
        hyperparameters: under their released names; those that the released constructor presets may be left out.

    Raises:
        ConfigError: an unknown source, or a hyper-parameter that is unknown, missing or of the wrong type.
        CheckpointError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    origin = _find(source)
    origin = origin.variant(hyperparameters) or origin
    values = _check_hyperparameters(origin, hyperparameters)
    _check_plain(state_dict, source)
    config = origin.config(values, state_dict)
    with torch.device("meta"):
        model = origin.build(config, values)
    theirs = _theirs(origin, model)
    expected = {theirs[k]: tuple(origin.to_theirs(k, t).shape) for k, t in model.state_dict().items()}
    if table := differences(expected, shapes_of(state_dict)):
        raise CheckpointError(f"these weights are not those of {source} with these hyper-parameters: {table}")
    bad = [k for k, t in state_dict.items() if t.device.type != "meta" and not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(f"weights of {source}: {bad[0]} is not finite ({len(bad)} of {len(state_dict)} tensors)")
    # One dtype for the whole network, the widest of the file: nothing is lost.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in state_dict.values()))
    ours = {name: origin.to_ours(name, state_dict[theirs[name]].detach().to(dtype, copy=True)) for name in theirs}
    model.load_state_dict({name: tensor.contiguous() for name, tensor in ours.items()}, assign=True)
    return model.eval()


def official_shapes(source: str, **hyperparameters: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that `from_official` takes for these hyper-parameters.

    Raises:
        ConfigError: as `from_official`.
    """
    origin = _find(source)
    with torch.device("meta"):
        values = _check_hyperparameters(origin, hyperparameters)
        model = origin.build(origin.config(values, {}), values)
    theirs = _theirs(origin, model)
    return {theirs[name]: tuple(origin.to_theirs(name, tensor).shape) for name, tensor in model.state_dict().items()}


def to_official(model: nn.Module, source: str | None = None) -> dict[str, Tensor]:
    """A model's tensors under their released names; `from_official` turned round.

    Args:
        source: a key of MAPS or LAYERS; None = the only one for this kind of backbone.

    Raises:
        ConfigError: no source, or more than one, has this kind of backbone, or the released code has no name for one
            of its parts.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, BackboneConfig | MixerConfig):
        raise ConfigError(f"{type(model).__name__} is no backbone of smalti: it has no released form")
    known = MAPS | LAYERS
    fitting = [name for name, origin in known.items() if origin.kind == config.kind and source in (None, name)]
    if len(fitting) != 1:
        raise ConfigError(
            f"{config.kind!r} has {len(fitting)} released forms{f' from {source!r}' if source else ''}; "
            f"choose from {', '.join(known)}"
        )
    origin = known[fitting[0]]
    if reason := origin.unreleased(config):
        raise ConfigError(f"{fitting[0]} cannot do {reason}: such a network was never released")
    theirs = _theirs(origin, model)
    return {theirs[name]: origin.to_theirs(name, tensor.detach()) for name, tensor in model.state_dict().items()}


def _find(source: str) -> Source:
    if source not in (known := MAPS | LAYERS):
        raise ConfigError(f"no released weights are known from {source!r}{did_you_mean(source, known)}")
    return known[source]


def _theirs(origin: Source, model: nn.Module) -> dict[str, str]:
    theirs, unknown = origin.keys.to_theirs(model.state_dict())
    if unknown:
        raise ConfigError(f"{origin.name} has no name for {', '.join(unknown[:4])}: such a network was never released")
    if idle := origin.keys.idle(theirs.values()):
        raise ConfigError(f"{origin.name} has {', '.join(idle)}, which this network has not: it was never released")
    return theirs


def _check_hyperparameters(origin: Source, given: Mapping[str, Any]) -> dict[str, Any]:
    wanted = origin.hyperparameters
    for name in given:
        if name not in wanted:
            raise ConfigError(f"{origin.name}: unknown hyper-parameter {name!r}{did_you_mean(name, wanted)}")
    if missing := [name for name in wanted if name not in given and name not in origin.defaults]:
        raise ConfigError(f"{origin.name}: missing hyper-parameter {', '.join(missing)}")
    values = {}
    for name, kind in wanted.items():
        value = given.get(name, origin.defaults.get(name))
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is list and isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted_type = getattr(kind, "__name__", str(kind))
            raise ConfigError(f"{origin.name}: hyper-parameter {name} is {value!r}, expected {wanted_type}")
        values[name] = value
    return values


def _check_plain(state_dict: Mapping[str, Tensor], source: str) -> None:
    if not state_dict:
        raise CheckpointError(f"the weights for {source} are empty")
    odd = [name for name, value in state_dict.items() if not isinstance(value, Tensor) or not value.is_floating_point()]
    if odd:
        inside = [name for name in ("ema", "model", "state_dict") if isinstance(state_dict.get(name), Mapping)]
        advice = f"pass its entry {inside[0]!r}" if inside else "expected names with floating-point tensors only"
        raise CheckpointError(f"the weights for {source} have the entry {odd[0]!r}, which is no weight: {advice}")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state_dict):
            raise CheckpointError(
                f"all names begin with {prefix!r}, left there by a training wrapper: remove it from the names"
            )
