"""Mixers: how tokens see each other. `(x: B N D, grid) -> B N D`, any mixer in any stack."""

from torch import nn

from smalti.nn.mixers.attention import Attention, AttentionConfig
from smalti.nn.mixers.base import ALONE, MixerConfig, Place
from smalti.nn.mixers.bi_ssm import BiSSM, BiSSMConfig
from smalti.nn.mixers.bi_wkv import BiWKV, BiWKVConfig
from smalti.nn.mixers.downsampled_attention import DownsampledAttention, DownsampledAttentionConfig

MIXERS: dict[str, tuple[type[MixerConfig], type[nn.Module]]] = {
    AttentionConfig.kind: (AttentionConfig, Attention),
    BiSSMConfig.kind: (BiSSMConfig, BiSSM),
    BiWKVConfig.kind: (BiWKVConfig, BiWKV),
    DownsampledAttentionConfig.kind: (DownsampledAttentionConfig, DownsampledAttention),
}


def build_mixer(config: MixerConfig, hidden_size: int, place: Place = ALONE) -> nn.Module:
    """The module that a mixer config stands for, initialised for its place in the stack."""
    return MIXERS[config.kind][1](config, hidden_size, place)


__all__ = [
    "ALONE",
    "MIXERS",
    "Attention",
    "AttentionConfig",
    "BiSSM",
    "BiSSMConfig",
    "BiWKV",
    "BiWKVConfig",
    "DownsampledAttention",
    "DownsampledAttentionConfig",
    "MixerConfig",
    "Place",
    "build_mixer",
]
