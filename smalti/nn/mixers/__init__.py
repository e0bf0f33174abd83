"""Mixers: how tokens see each other. `(x: B N D, grid) -> B N D`, any mixer in any stack."""

from torch import nn

from smalti.nn.mixers.attention import Attention, AttentionConfig
from smalti.nn.mixers.base import MixerConfig

MIXERS: dict[str, tuple[type[MixerConfig], type[nn.Module]]] = {
    AttentionConfig.kind: (AttentionConfig, Attention),
}


def build_mixer(config: MixerConfig, hidden_size: int) -> nn.Module:
    """The module that a mixer config stands for."""
    return MIXERS[config.kind][1](config, hidden_size)


__all__ = ["MIXERS", "Attention", "AttentionConfig", "MixerConfig", "build_mixer"]
