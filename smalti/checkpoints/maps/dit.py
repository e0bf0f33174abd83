"""facebookresearch/DiT. Source: key names and shapes of the released checkpoints of Peebles & Xie, arXiv:2212.09748."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smalti.checkpoints.keymap import KeyMap
from smalti.checkpoints.maps.base import Source
from smalti.config import replace
from smalti.errors import ConfigError
from smalti.models import BackboneConfig, DiTConfig
from smalti.nn.embeddings import sincos_2d
from smalti.nn.mixers import AttentionConfig

_KEYS = KeyMap(
    {
        "pos_embed": "position",
        "x_embedder.proj": "embed.proj",
        "t_embedder.mlp.0": "conditioning.timestep.fc1",
        "t_embedder.mlp.2": "conditioning.timestep.fc2",
        "y_embedder.embedding_table": "conditioning.label",
        "blocks.{}.adaLN_modulation.1": "blocks.{}.modulation.linear",
        "blocks.{}.attn.qkv": "blocks.{}.mixer.qkv",
        "blocks.{}.attn.proj": "blocks.{}.mixer.out",
        "blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1",
        "blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
        "final_layer.adaLN_modulation.1": "head.modulation.linear",
        "final_layer.linear": "head.out",
    }
)

# A released table may have drifted, because the moving average of the weights took it along: each step rounds twice, by
# up to 2^-25 each near 1, and takes back 1 - 0.9999 of the error, so the two balance at this.
_DRIFT = 2 * 2.0**-25 / (1 - 0.9999)


def _config(h: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BackboneConfig:
    if h["num_classes"] < 1 or not 0 <= h["class_dropout_prob"] < 1:
        raise ConfigError(
            f"num_classes {h['num_classes']} must be at least 1 and "
            f"class_dropout_prob {h['class_dropout_prob']} in [0, 1)"
        )
    config = DiTConfig(
        sample_size=(h["input_size"], h["input_size"]),
        patch_size=h["patch_size"],
        in_channels=h["in_channels"],
        hidden_size=h["hidden_size"],
        depth=h["depth"],
        mixer=AttentionConfig(num_heads=h["num_heads"]),
        mlp_ratio=h["mlp_ratio"],
        num_classes=h["num_classes"],
        # The null row is there because labels were dropped in training; without dropout there is none.
        null_class=h["class_dropout_prob"] > 0,
        learned_variance=h["learn_sigma"],
    )
    table = tensors.get("pos_embed")
    if table is None or table.device.type == "meta" or table.numel() != config.grid.tokens * config.hidden_size:
        return config
    return config if is_standard_table(table, config) else replace(config, position="table")


def is_standard_table(table: Tensor, config: DiTConfig) -> bool:
    """Whether a position table is the sincos one of the config's grid, but for rounding and drift."""
    expected = sincos_2d(*config.grid, config.hidden_size)
    error = (table.detach().cpu().double().reshape(expected.shape) - expected).abs().max()
    return bool(error <= _DRIFT + torch.finfo(table.dtype).eps / 2)


def _unreleased(config: BackboneConfig) -> str:
    assert isinstance(config, DiTConfig)
    rows, columns = config.sample_size
    if config.timestep_frequencies == "closed":
        return "closed timestep frequencies"
    if config.conditioning == "adaln":  # the others show in the names of their tensors
        return "conditioning 'adaln'"
    return f"a sample_size of {rows}x{columns}, which is not square," if rows != columns else ""


def _released(config: BackboneConfig) -> dict[str, Any]:
    assert isinstance(config, DiTConfig)
    reason = f"the mixer {config.mixer.kind!r}" if not isinstance(config.mixer, AttentionConfig) else ""
    if reason := reason or _unreleased(config):
        raise ConfigError(f"{DIT.name} cannot do {reason}: such a network was never released")
    assert isinstance(config.mixer, AttentionConfig)
    return {
        "input_size": config.sample_size[0],
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.mixer.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "class_dropout_prob": 0.1 if config.null_class else 0.0,
        "num_classes": config.num_classes,
        "learn_sigma": config.learned_variance,
    }


DIT = Source(
    name="facebookresearch/DiT",
    kind=DiTConfig.kind,
    hyperparameters={
        "input_size": int,
        "patch_size": int,
        "in_channels": int,
        "hidden_size": int,
        "depth": int,
        "num_heads": int,
        "mlp_ratio": float,
        "class_dropout_prob": float,
        "num_classes": int,
        "learn_sigma": bool,
    },
    keys=_KEYS,
    config=_config,
    unreleased=_unreleased,
    released=_released,
)
