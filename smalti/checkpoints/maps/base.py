"""What a source of released weights is to us."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

from torch import Tensor

from smalti.checkpoints.keymap import KeyMap
from smalti.models import BackboneConfig


@dataclass(frozen=True)
class Source:
    """A row of MAPS.

    Args:
        unreleased: what a config asks for that the released code cannot do and that no tensor's name shows; "" for
            nothing.
        released: the hyper-parameters to build this network with, those of ours left out; ConfigError if none do. What
            a config does not say, such as how often labels were dropped, is as in the paper.
    """

    name: str  # owner/repository
    kind: str  # of the backbone that its weights become
    hyperparameters: Mapping[str, type | UnionType]  # released names
    keys: KeyMap
    config: Callable[[Mapping[str, Any], Mapping[str, Tensor]], BackboneConfig]  # from hyper-parameters and weights
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of the released constructor, for those not given
    unreleased: Callable[[BackboneConfig], str] = lambda config: ""
    released: Callable[[BackboneConfig], dict[str, Any]] | None = None
