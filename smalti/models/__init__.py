"""Backbones: `(latents, timesteps, class_labels) -> output`, bound only by that signature."""

from typing import NamedTuple

from torch import nn

from smalti.models.base import Backbone, BackboneConfig, Fusable
from smalti.models.diffussm import DiffuSSM, DiffuSSMConfig
from smalti.models.dit import DiT, DiTConfig
from smalti.models.drwkv import DRWKV, DRWKVConfig
from smalti.models.inference import InferenceForm, InferenceMode, compile_refusal, inference_form
from smalti.models.udit import UDiT, UDiTConfig


class BackboneEntry(NamedTuple):
    """A row of BACKBONES."""

    config: type[BackboneConfig]
    module: type[nn.Module]


BACKBONES: dict[str, BackboneEntry] = {
    DiTConfig.kind: BackboneEntry(DiTConfig, DiT),
    DiffuSSMConfig.kind: BackboneEntry(DiffuSSMConfig, DiffuSSM),
    DRWKVConfig.kind: BackboneEntry(DRWKVConfig, DRWKV),
    UDiTConfig.kind: BackboneEntry(UDiTConfig, UDiT),
}


def build_backbone(config: BackboneConfig) -> nn.Module:
    """The network that a config stands for, freshly initialised from torch's global generator."""
    return BACKBONES[config.kind].module(config)


def config_of(model: nn.Module) -> BackboneConfig:
    """The config that a backbone was built from.

    Raises:
        TypeError: the module is not a backbone of smalti, or is wrapped in something else.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, BackboneConfig):
        raise TypeError(f"{type(model).__name__} has no backbone config: pass the backbone itself, not a wrapper")
    return config


__all__ = [
    "BACKBONES",
    "DRWKV",
    "Backbone",
    "BackboneConfig",
    "BackboneEntry",
    "DRWKVConfig",
    "DiT",
    "DiTConfig",
    "DiffuSSM",
    "DiffuSSMConfig",
    "Fusable",
    "InferenceForm",
    "InferenceMode",
    "UDiT",
    "UDiTConfig",
    "build_backbone",
    "compile_refusal",
    "config_of",
    "inference_form",
]
