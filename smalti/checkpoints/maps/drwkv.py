"""feizc/Diffusion-RWKV. Source: key names and shapes of the released networks of Fei et al., arXiv:2404.04478."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smalti.checkpoints.keymap import KeyMap
from smalti.checkpoints.maps.base import Source
from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.models import BackboneConfig, DRWKVConfig
from smalti.nn.mixers import BiWKVConfig

# Blocks before the middle one, the middle one, and those behind it.
_BLOCKS = {"in_blocks.{}": "in_blocks.{}", "mid_block": "mid_blocks.0", "out_blocks.{}": "out_blocks.{}"}
_IN_EVERY_BLOCK = {
    "adaLN_modulation.1": "modulation.linear",
    "ln1": "norm1",
    "ln2": "norm2",
    "att.spatial_decay": "mixer.decay",
    "att.spatial_first": "mixer.bonus",
    "att.key": "mixer.key",
    "att.value": "mixer.value",
    "att.receptance": "mixer.gate",
    "att.output": "mixer.out",
    "ffn.key": "mlp.key",
    "ffn.value": "mlp.value",
    "ffn.receptance": "mlp.gate",
}
_IN_SOME_NETWORKS = {  # those with a shift, and those with key_norm
    "att.spatial_mix_k": "mixer.neighbours.shares.key",
    "att.spatial_mix_v": "mixer.neighbours.shares.value",
    "att.spatial_mix_r": "mixer.neighbours.shares.gate",
    "ffn.spatial_mix_k": "mlp.neighbours.shares.key",
    "ffn.spatial_mix_r": "mlp.neighbours.shares.gate",
    "att.key_norm": "mixer.norm",
    "ffn.key_norm": "mlp.norm",
}


def _in_blocks(rules: Mapping[str, str]) -> dict[str, str]:
    return {f"{b}.{theirs}": f"{block}.{ours}" for b, block in _BLOCKS.items() for theirs, ours in rules.items()}


_KEYS = KeyMap(
    {
        "pos_embed": "position",
        "patch_embed.proj": "embed.proj",
        "time_embed.mlp.0": "conditioning.timestep.fc1",
        "time_embed.mlp.2": "conditioning.timestep.fc2",
        "label_emb.embedding_table": "conditioning.label",
        "in_blocks.{}.ln0": "in_blocks.{}.first_norm",
        **_in_blocks(_IN_EVERY_BLOCK),
        **_in_blocks(_IN_SOME_NETWORKS),
        "out_blocks.{}.skip_linear": "out_blocks.{}.join.linear",
        "norm_f": "norm",
        "final_layer.adaLN_modulation.1": "head.modulation.linear",
        "final_layer.linear": "head.out",
    },
    optional=["label_emb.embedding_table", "out_blocks.{}.skip_linear", *_in_blocks(_IN_SOME_NETWORKS)],
)

# Taken by the released constructor; other values than these were never released, or have no released meaning.
_FIXED = {"drop_rate": 0.0, "norm_epsilon": 1e-5, "shift_mode": "q_shift", "layer_scale": True, "skip": True}


def _config(h: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BackboneConfig:
    for name, value in _FIXED.items():
        if h[name] != value:
            raise ConfigError(f"{name} is {h[name]!r}: networks were released with {value!r} only")
    if h["num_classes"] < -1 or not 0 <= h["class_dropout_prob"] < 1 or not 0 <= h["drop_path_rate"] < 1:
        raise ConfigError(
            f"num_classes {h['num_classes']} must be at least 1, or -1 or 0 for none, class_dropout_prob "
            f"{h['class_dropout_prob']} and drop_path_rate {h['drop_path_rate']} in [0, 1)"
        )
    if h["depth"] < 2:
        raise ConfigError(f"depth {h['depth']} leaves no block beside the middle one: released networks have 3 or more")
    if h["hidden_rate"] < 1:
        raise ConfigError(f"hidden_rate {h['hidden_rate']} must be at least 1")
    if h["wkv"] not in ("release", "paper"):
        raise ConfigError(f"unknown wkv {h['wkv']!r}{did_you_mean(h['wkv'], ('release', 'paper'))}")
    # Long skips are always there in the released network; its block without one is told by the missing tensors.
    skips = not tensors or any(".skip_linear." in name for name in tensors)
    return DRWKVConfig(
        sample_size=(h["img_size"], h["img_size"]),
        patch_size=h["patch_size"],
        in_channels=h["channels"],
        hidden_size=h["embed_dim"],
        depth=2 * (h["depth"] // 2) + 1,  # half before the middle block and half behind it, whatever was asked for
        mixer=BiWKVConfig(
            wkv=h["wkv"],
            key_norm=h["key_norm"],
            shift=h["shift_pixel"],
            shift_fraction=h["channel_gamma"],
            init=h["init_mode"],
        ),
        mlp_ratio=float(h["hidden_rate"]),
        mlp_shift=h["shift_pixel"],
        mlp_shift_fraction=h["channel_gamma"],
        mlp_key_norm=h["key_norm"],
        mlp_init=h["init_mode"],
        num_classes=max(h["num_classes"], 0),
        # As in DiT: the null row is there because labels were dropped in training.
        null_class=h["class_dropout_prob"] > 0,
        learned_variance=h["learn_sigma"],
        skip="concat" if skips else "none",
        post_norm=h["post_norm"],
    )


def _unreleased(config: BackboneConfig) -> str:
    """What two networks with the same names of tensors may differ in."""
    if not isinstance(config, DRWKVConfig) or not isinstance(config.mixer, BiWKVConfig):
        return ""  # their names differ
    mixer = config.mixer
    if config.conditioning != "adaln_zero" or config.skip == "add":
        return f"conditioning {config.conditioning!r} with skip {config.skip!r}"
    if config.mlp_ratio != int(config.mlp_ratio):
        return f"mlp_ratio {config.mlp_ratio}"
    if not mixer.divide_bonus:
        return "divide_bonus False"
    if config.sample_size[0] != config.sample_size[1]:
        return f"sample_size {config.sample_size[0]}x{config.sample_size[1]}, which is not square"
    ours = (mixer.shift, mixer.shift_fraction, mixer.key_norm)
    if ours != (config.mlp_shift, config.mlp_shift_fraction, config.mlp_key_norm):
        return "a shift or key_norm in the mixer that differs from the one in the channel mix"
    return ""


def _released(config: BackboneConfig) -> dict[str, Any]:
    if not isinstance(config, DRWKVConfig) or not isinstance(config.mixer, BiWKVConfig):
        raise ConfigError(f"{DRWKV.name} has Bi-WKV for a mixer only: this network was never released")
    if (reason := _unreleased(config)) or not config.norm_affine:
        raise ConfigError(f"{DRWKV.name} cannot do {reason or 'norm_affine False'}: this network was never released")
    return {
        "img_size": config.sample_size[0],
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "channels": config.in_channels,
        "depth": config.depth,
        "num_classes": config.num_classes or -1,
        "channel_gamma": config.mlp_shift_fraction,
        "shift_pixel": config.mlp_shift,
        "init_mode": config.mlp_init,
        "post_norm": config.post_norm,
        "key_norm": config.mlp_key_norm,
        "hidden_rate": int(config.mlp_ratio),
        "learn_sigma": config.learned_variance,
        "class_dropout_prob": 0.1 if config.null_class else 0.0,
    }


DRWKV = Source(
    name="feizc/Diffusion-RWKV",
    kind=DRWKVConfig.kind,
    hyperparameters={
        "img_size": int,
        "patch_size": int,
        "embed_dim": int,
        "channels": int,
        "depth": int,
        "num_classes": int,
        "drop_rate": float,
        "drop_path_rate": float,
        "norm_epsilon": float,
        "channel_gamma": float,
        "shift_pixel": int,
        "shift_mode": str,
        "init_mode": str,
        "post_norm": bool,
        "key_norm": bool,
        "layer_scale": bool,
        "hidden_rate": int,
        "learn_sigma": bool,
        "skip": bool,
        "class_dropout_prob": float,
        "wkv": str,  # ours: the arithmetic of the released kernel, or the published formula
    },
    keys=_KEYS,
    config=_config,
    defaults={
        **_FIXED,
        "num_classes": -1,
        "drop_path_rate": 0.1,
        "channel_gamma": 0.25,
        "shift_pixel": 1,
        "init_mode": "fancy",
        "post_norm": False,
        "key_norm": False,
        "hidden_rate": 4,
        "learn_sigma": True,
        "class_dropout_prob": 0.1,
        "wkv": "release",
    },
    unreleased=_unreleased,
    released=_released,
)
