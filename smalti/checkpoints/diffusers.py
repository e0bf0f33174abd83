"""DiT in the folder layout of diffusers' `DiTTransformer2DModel`, there and back.

That class keeps a copy of the timestep and label embedding in every block, has queries, keys and values in three
layers, and computes its position table. Its timestep frequencies are spaced otherwise than those of the released DiT,
and no setting of it changes that: see `timestep_frequencies` of `DiTConfig`, and docs/guide/convert.md.

Source: class and keys of diffusers 0.42, by building it and running it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from smalti.checkpoints.keymap import KeyMap
from smalti.checkpoints.maps.dit import is_standard_table
from smalti.errors import CheckpointError, ConfigError
from smalti.models import DiTConfig, build_backbone
from smalti.models.dit import FrequencyKind
from smalti.nn.embeddings import sincos_2d
from smalti.nn.mixers import AttentionConfig
from smalti.storage.precheck import check_safetensors
from smalti.storage.tensors import differences, read_tensors, shapes_of

NAME, CLASS = "diffusers", "DiTTransformer2DModel"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

_KEYS = KeyMap(
    {
        "pos_embed.proj": "embed.proj",
        "transformer_blocks.{}.norm1.linear": "blocks.{}.modulation.linear",
        "transformer_blocks.{}.attn1.to_out.0": "blocks.{}.mixer.out",
        "transformer_blocks.{}.ff.net.0.proj": "blocks.{}.mlp.fc1",
        "transformer_blocks.{}.ff.net.2": "blocks.{}.mlp.fc2",
        "proj_out_1": "head.modulation.linear",
        "proj_out_2": "head.out",
    }
)
_IN_EVERY_BLOCK = {  # one copy here, as many there as there are blocks
    "conditioning.timestep.fc1": "norm1.emb.timestep_embedder.linear_1",
    "conditioning.timestep.fc2": "norm1.emb.timestep_embedder.linear_2",
    "conditioning.label": "norm1.emb.class_embedder.embedding_table",
}
_THREE = ("to_q", "to_k", "to_v")  # one product here, in this order

# What the class can be told besides sizes, each with the one value that is a DiT.
_FIXED: Mapping[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "upcast_attention": False,
    "norm_num_groups": 32,
}
_EPS = 1e-6
_SIZES = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None}
_SIZES |= {"num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000}
# A note of ours in their config; names that begin with an underscore are theirs to ignore.
_NOTE = "_smalti_timestep_frequencies"


@dataclass(frozen=True)
class FromDiffusers:
    """A network from a folder of diffusers.

    Args:
        notes: what the folder says and this network does otherwise, in a line each.
    """

    model: nn.Module
    notes: tuple[str, ...]


def to_diffusers(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A DiT as `DiTTransformer2DModel`: its config and its tensors.

    With `timestep_frequencies="half_open"`, which is the papers', the class needs one line after loading to compute the
    same: `for block in model.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0`.

    Raises:
        ConfigError: the network has something that the class cannot express.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, DiTConfig):
        raise ConfigError(
            f"diffusers has no class for a {getattr(config, 'kind', type(model).__name__)}: only for a DiT"
        )
    if reason := _inexpressible(config, model.state_dict()):
        raise ConfigError(f"diffusers' {CLASS} cannot express {reason}")
    assert isinstance(config.mixer, AttentionConfig)
    heads = config.mixer.num_heads
    theirs = {
        "_class_name": CLASS,
        "_diffusers_version": "0.42.1",
        _NOTE: config.timestep_frequencies,
        "num_attention_heads": heads,
        "attention_head_dim": config.hidden_size // heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.sample_size[0],
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": _EPS,
        **_FIXED,
    }
    return theirs, _to_theirs(model.state_dict(), config.depth)


def from_diffusers(folder: Path, *, timestep_frequencies: str | None = None) -> FromDiffusers:
    """The DiT in a folder with `config.json` and `diffusion_pytorch_model.safetensors`.

    Args:
        timestep_frequencies: None = as the folder says if smalti wrote it, else "closed", which is what diffusers
            computes. Weights that were converted from the released ones were trained with "half_open".

    Raises:
        CheckpointError: the folder holds something else, is damaged, or is a network that DiT is not.
    """
    folder = Path(folder)
    theirs = _read_config(folder)
    config, notes = _config(theirs, folder, timestep_frequencies)
    path = folder / WEIGHTS
    check_safetensors(path)
    found = read_tensors(path)
    with torch.device("meta"):
        model = build_backbone(config)
    expected = _to_theirs(model.state_dict(), config.depth)
    if table := differences(shapes_of(expected), shapes_of(found)):
        raise CheckpointError(f"{path} holds another network than its {CONFIG} says: {table}")
    bad = [name for name, t in found.items() if not t.is_floating_point() or not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(f"{path}: {bad[0]} is not finite or no weight ({len(bad)} of {len(found)} tensors)")
    ours = _to_ours(found, config.depth, path)
    dtypes = {tensor.dtype for tensor in ours.values()}
    if len(dtypes) > 1:
        raise CheckpointError(f"{path} mixes the types {', '.join(sorted(map(str, dtypes)))}: expected one")
    dtype = dtypes.pop()
    ours["position"] = sincos_2d(*config.grid, config.hidden_size).to(dtype)[None]
    model.load_state_dict(ours, assign=True)
    return FromDiffusers(model.eval(), notes)


def _inexpressible(config: DiTConfig, tensors: Mapping[str, Tensor]) -> str:
    rows, columns = config.sample_size
    if config.conditioning != "adaln_zero":
        return f"conditioning {config.conditioning!r}: its blocks are conditioned by adaLN-Zero"
    if not isinstance(config.mixer, AttentionConfig):
        return f"the mixer {config.mixer.kind!r}: its blocks have plain attention"
    if rows != columns:
        return f"a sample_size of {rows}x{columns}: it is square"
    if not config.num_classes or not config.null_class:
        return "a network without classes or without a null class: its label table always has both"
    if int(config.hidden_size * config.mlp_ratio) != 4 * config.hidden_size:
        return f"mlp_ratio {config.mlp_ratio}: its MLPs are 4 times as wide as the tokens"
    if config.position != "sincos_2d" or not is_standard_table(tensors["position"], config):
        return "a position table of the network's own: it computes the table"
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        return "weights of several types"
    return ""


def _to_theirs(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our tensors under their names: total, every tensor but the position table has its place."""
    rest = dict(tensors)
    del rest["position"]
    result = {}
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for leaf in ("weight", "bias"):
            fused = rest.pop(f"blocks.{i}.mixer.qkv.{leaf}")
            for name, part in zip(_THREE, fused.chunk(3), strict=True):
                result[f"{block}.attn1.{name}.{leaf}"] = part
            for ours, theirs in _IN_EVERY_BLOCK.items():
                if (tensor := rest.get(f"{ours}.{leaf}")) is not None:  # the label table has no bias
                    result[f"{block}.{theirs}.{leaf}"] = tensor
    for name in [n for n in rest if n.rsplit(".", 1)[0] in _IN_EVERY_BLOCK]:
        del rest[name]
    names, unknown = _KEYS.to_theirs(rest)
    assert not unknown, unknown
    return result | {names[name]: tensor.detach() for name, tensor in rest.items()}


def _to_ours(tensors: Mapping[str, Tensor], depth: int, path: Path) -> dict[str, Tensor]:
    """`_to_theirs` turned round; the names are known to be right."""
    rest, result = dict(tensors), {}
    for leaf in ("weight", "bias"):
        for ours, theirs in _IN_EVERY_BLOCK.items():
            copies = [rest.pop(f"transformer_blocks.{i}.{theirs}.{leaf}", None) for i in range(depth)]
            if (first := copies[0]) is None:
                continue
            for i, copy in enumerate(copies):
                if copy is None or not torch.equal(copy, first):
                    raise CheckpointError(
                        f"{path}: block {i} has another {theirs}.{leaf} than block 0; a DiT embeds timesteps and "
                        "labels once, so a network whose copies were trained apart is none"
                    )
            result[f"{ours}.{leaf}"] = first
        for i in range(depth):
            parts = [rest.pop(f"transformer_blocks.{i}.attn1.{name}.{leaf}") for name in _THREE]
            result[f"blocks.{i}.mixer.qkv.{leaf}"] = torch.cat(parts)
    names, unknown = _KEYS.to_ours(rest)
    assert not unknown, unknown
    return result | {names[name]: tensor for name, tensor in rest.items()}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        inside = " (its folder 'transformer' has one: give that)" if (folder / "transformer" / CONFIG).exists() else ""
        raise CheckpointError(f"{folder} has no {missing[0]}: expected a folder of diffusers' {CLASS}{inside}")
    try:
        theirs = json.loads(path.read_bytes()[: 1 << 20])
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is no JSON document") from error
    if not isinstance(theirs, dict) or theirs.get("_class_name") != CLASS:
        found = theirs.get("_class_name") if isinstance(theirs, dict) else None
        raise CheckpointError(f"{path} describes {found!r}, expected {CLASS!r}")
    return theirs


def _config(theirs: Mapping[str, Any], folder: Path, frequencies: str | None) -> tuple[DiTConfig, tuple[str, ...]]:
    """Our config for theirs. Older versions wrote more names, with None or False for what a DiT has not."""
    where, notes = folder / CONFIG, []
    for name, value in _FIXED.items():
        if theirs.get(name, value) != value:
            raise CheckpointError(f"{where}: {name} is {theirs[name]!r}; in a DiT it is {value!r}")
    known = {*_FIXED, *_SIZES, "norm_eps"}
    odd = [n for n, v in theirs.items() if n not in known and not n.startswith("_") and v not in (None, False)]
    if odd:
        raise CheckpointError(f"{where}: {odd[0]} is {theirs[odd[0]]!r}, which a DiT has not")
    sizes = {name: theirs.get(name, default) for name, default in _SIZES.items()}
    out = sizes.pop("out_channels")
    for name, value in sizes.items():
        if type(value) is not int or not 0 < value < 1 << 20:
            raise CheckpointError(f"{where}: {name} is {value!r}, expected a whole number above 0")
    channels = sizes["in_channels"]
    if out not in (None, channels, 2 * channels):
        raise CheckpointError(f"{where}: out_channels is {out!r}, expected {channels} or {2 * channels}")
    if (eps := theirs.get("norm_eps", 1e-5)) != _EPS:
        if eps != 1e-5:
            raise CheckpointError(f"{where}: norm_eps is {eps!r}; in a DiT it is {_EPS}")
        notes.append("the folder's second norms have eps 1e-5, diffusers' default; DiT has 1e-6 and computes with it")
    said = theirs.get(_NOTE)
    if frequencies is None and said is None:
        notes.append(
            "timestep frequencies as diffusers computes them; for weights that were converted from the released DiT, "
            "add --set timestep_frequencies=half_open"
        )
    try:
        config = DiTConfig(
            sample_size=(sizes["sample_size"], sizes["sample_size"]),
            in_channels=channels,
            num_classes=sizes["num_embeds_ada_norm"],
            learned_variance=out == 2 * channels,
            hidden_size=sizes["num_attention_heads"] * sizes["attention_head_dim"],
            depth=sizes["num_layers"],
            mixer=AttentionConfig(num_heads=sizes["num_attention_heads"]),
            patch_size=sizes["patch_size"],
            timestep_frequencies=cast(FrequencyKind, frequencies or said or "closed"),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return config, tuple(notes)
