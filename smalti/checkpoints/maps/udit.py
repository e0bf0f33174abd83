"""YuchuanTian/U-DiT. Source: key names and shapes of the released networks of Tian et al., arXiv:2405.02730.

Weights must be those of training. The released code adds its fused kernels into the live weights on every switch to
evaluation; what was saved after that is another function, and no name shows it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smalti.checkpoints.keymap import KeyMap
from smalti.checkpoints.maps.base import Source
from smalti.errors import ConfigError
from smalti.models import BackboneConfig, UDiTConfig
from smalti.nn.mixers import DownsampledAttentionConfig

_STAGES = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
_ALWAYS = {
    "x_embedder.proj": "embed",
    "down1_2.body.0": "down.0",
    "down2_3.body.0": "down.1",
    "up3_2.body.0": "up.0",
    "up2_1.body.0": "up.1",
    "reduce_chan_level2": "join.0",
    "reduce_chan_level1": "join.1",
    "output": "head.conv",
    "final_layer.adaLN_modulation.1": "head.modulation.linear",
    "final_layer.out_proj": "head.out",
    **{f"t_embedder_{i + 1}.mlp.0": f"conditioning.{i}.timestep.fc1" for i in range(3)},
    **{f"t_embedder_{i + 1}.mlp.2": f"conditioning.{i}.timestep.fc2" for i in range(3)},
    **{f"y_embedder_{i + 1}.embedding_table": f"conditioning.{i}.label" for i in range(3)},
}
_LAYER = {  # of layer # in a block; a network has one of the three kinds of MLP
    "adaLN_modulation#.1": "modulation.linear",
    "attn#.downsampler.layer": "mixer.depthwise",
    "attn#.to_qkv": "mixer.qkv",
    "attn#.logit_scale": "mixer.scale",
    "attn#.to_out": "mixer.out",
    "mlp#.project_in.0": "mlp.in1",
    "mlp#.project_in.1": "mlp.in2",
    "mlp#.dwconv.0": "mlp.depthwise5",
    "mlp#.dwconv.1": "mlp.depthwise3",
    "mlp#.dwconv.2": "mlp.depthwise1",
    "mlp#.project_out.0": "mlp.out1",
    "mlp#.project_out.1": "mlp.out2",
    "mlp#.project_in": "mlp.expand",
    "mlp#.dwconv": "mlp.depthwise",
    "mlp#.project_out": "mlp.contract",
    "mlp#.fc1": "mlp.fc1",
    "mlp#.fc2": "mlp.fc2",
}
# A stage may be empty, and the MLP and the attention come in several forms: no rule of a layer must meet a tensor.
_LAYERS = {
    f"{stage}.{{}}.{theirs.replace('#', str(layer + 1))}": f"stages.{i}.{{}}.layers.{layer}.{ours}"
    for i, stage in enumerate(_STAGES)
    for layer in range(2)
    for theirs, ours in _LAYER.items()
}
# What a released name and value stand for.
_MLPS = {"rep": ("depthwise", "reparameterized"), "basic": ("basic", "basic")}  # without and with `rep`
_COSINE = {"v2": True, None: False}
_POSITION = {"rope2d": "rope2d_square", None: "none"}


def _one_of(table: Mapping[Any, Any], name: str, value: Any) -> Any:
    if value not in table:
        known = ", ".join(map(repr, table))
        raise ConfigError(f"YuchuanTian/U-DiT: hyper-parameter {name} is {value!r}, expected one of {known}")
    return table[value]


def _config(h: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BackboneConfig:
    if h["num_classes"] < 1 or not 0 <= h["class_dropout_prob"] < 1:
        raise ConfigError(
            f"num_classes {h['num_classes']} must be at least 1 and "
            f"class_dropout_prob {h['class_dropout_prob']} in [0, 1)"
        )
    depth = h["depth"]
    if len(depth) != 5 or not all(type(number) is int for number in depth):
        raise ConfigError(f"YuchuanTian/U-DiT: hyper-parameter depth is {depth!r}, expected five whole numbers")
    return UDiTConfig(
        sample_size=(h["input_size"], h["input_size"]),
        in_channels=h["in_channels"],
        hidden_size=h["hidden_size"],
        depth=tuple(depth),
        mixer=DownsampledAttentionConfig(
            num_heads=h["num_heads"],
            factor=h["down_factor"],
            downsampler=h["downsampler"],
            shortcut=bool(h["down_shortcut"]),
            cosine=_one_of(_COSINE, "attn_type", h["attn_type"]),
            position=_one_of(_POSITION, "posemb_type", h["posemb_type"]),
        ),
        mlp=_one_of(_MLPS, "ffn_type", h["ffn_type"])[bool(h["rep"])],
        mlp_ratio=h["mlp_ratio"],
        num_classes=h["num_classes"],
        # The null row is there because labels were dropped in training; without dropout there is none.
        null_class=h["class_dropout_prob"] > 0,
        learned_variance=h["learn_sigma"],
    )


def _unreleased(config: BackboneConfig) -> str:
    assert isinstance(config, UDiTConfig)
    if not isinstance(config.mixer, DownsampledAttentionConfig):
        return f"the mixer {config.mixer.kind!r}"
    if config.conditioning != "adaln_zero":
        return f"the conditioning {config.conditioning!r}"
    rows, columns = config.sample_size
    if config.mixer.position == "rope2d" and rows != columns:
        return f"rotary positions by row and column on {rows}x{columns}"
    return ""


def _released(config: BackboneConfig) -> dict[str, Any]:
    assert isinstance(config, UDiTConfig)
    if reason := _unreleased(config):
        raise ConfigError(f"{UDIT.name} cannot do {reason}: such a network was never released")
    assert isinstance(config.mixer, DownsampledAttentionConfig)
    mixer = config.mixer
    forms = [(ffn, rep) for ffn, kinds in _MLPS.items() for rep, kind in enumerate(kinds) if kind == config.mlp]
    return {
        "input_size": config.sample_size[0],
        "down_factor": mixer.factor,
        "in_channels": config.in_channels,
        "hidden_size": config.hidden_size,
        "depth": list(config.depth),
        "num_heads": mixer.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "class_dropout_prob": 0.1 if config.null_class else 0.0,
        "num_classes": config.num_classes,
        "learn_sigma": config.learned_variance,
        "ffn_type": forms[-1][0],
        "rep": forms[-1][1],
        "attn_type": "v2" if mixer.cosine else None,
        "posemb_type": None if mixer.position == "none" else "rope2d",
        "downsampler": mixer.downsampler,
        "down_shortcut": int(mixer.shortcut),
    }


UDIT = Source(
    name="YuchuanTian/U-DiT",
    kind=UDiTConfig.kind,
    hyperparameters={
        "input_size": int,
        "down_factor": int,
        "in_channels": int,
        "hidden_size": int,
        "depth": list,
        "num_heads": int,
        "mlp_ratio": float,
        "class_dropout_prob": float,
        "num_classes": int,
        "learn_sigma": bool,
        "rep": int | bool,
        "ffn_type": str,
        "attn_type": str | None,
        "posemb_type": str | None,
        "downsampler": str,
        "down_shortcut": int | bool,
    },
    keys=KeyMap(_ALWAYS | _LAYERS, optional=_LAYERS),
    config=_config,
    defaults={
        "input_size": 32,
        "down_factor": 2,
        "in_channels": 4,
        "depth": [2, 5, 8, 5, 2],
        "mlp_ratio": 2.0,
        "class_dropout_prob": 0.1,
        "num_classes": 1000,
        "learn_sigma": True,
        "rep": 1,
        "ffn_type": "rep",
        "attn_type": "v2",
        "posemb_type": "rope2d",
        "downsampler": "dwconv5",
        "down_shortcut": 1,
    },
    unreleased=_unreleased,
    released=_released,
)
