"""What a source of released weights is to us."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, NamedTuple

from torch import Tensor, nn

from smalti.checkpoints.keymap import KeyMap
from smalti.models import BackboneConfig, build_backbone
from smalti.nn.mixers import MixerConfig


class Translation(NamedTuple):
    """A tensor that the released code stores in another shape or with another sign; each way undoes the other."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


_AS_IT_IS = Translation(lambda tensor: tensor, lambda tensor: tensor)


@dataclass(frozen=True)
class Source:
    """A row of MAPS, or of LAYERS for weights that are no whole network.

    Args:
        build: the module, from its config and the hyper-parameters.
        translations: by our names, for tensors that do not merely change their name.
        variant: another row for the same repository when these hyper-parameters belong to another of its classes.
        unreleased: what a config asks for that the released code cannot do and that no tensor's name shows; "" for
            nothing.
        released: the hyper-parameters to build this network with, those of ours left out; ConfigError if none do. What
            a config does not say, such as how often labels were dropped, is as in the paper.
    """

    name: str  # owner/repository
    kind: str  # of the backbone or mixer that its weights become
    hyperparameters: Mapping[str, type | UnionType]  # released names
    keys: KeyMap
    # From hyper-parameters and weights.
    config: Callable[[Mapping[str, Any], Mapping[str, Tensor]], BackboneConfig | MixerConfig]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of the released constructor, for those not given
    unreleased: Callable[[Any], str] = lambda config: ""
    released: Callable[[BackboneConfig], dict[str, Any]] | None = None
    build: Callable[[Any, Mapping[str, Any]], nn.Module] = lambda config, values: build_backbone(config)
    translations: Mapping[str, Translation] = field(default_factory=dict)
    variant: Callable[[Mapping[str, Any]], "Source | None"] = lambda given: None

    def to_ours(self, name: str, tensor: Tensor) -> Tensor:
        """A released tensor as the parameter of ours with this name holds it."""
        return self.translations.get(name, _AS_IT_IS).to_ours(tensor)

    def to_theirs(self, name: str, tensor: Tensor) -> Tensor:
        """Our parameter of this name as the released code stores it."""
        return self.translations.get(name, _AS_IT_IS).to_theirs(tensor)
