"""DiT: the twelve sizes of the paper, and XL/2 with the three other conditionings and at 512.

Source: Peebles & Xie 2023, arXiv:2212.09748, tables 1 and 4 and figure 5; totals counted on the released classes.
"""

from dataclasses import replace

from smalti.models import DiTConfig
from smalti.nn.conditioning import ConditioningKind
from smalti.nn.mixers import AttentionConfig
from smalti.presets.preset import Preset, Published

_SIZES = {  # depth, hidden size, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

_PUBLISHED = {  # millions of parameters, GMACs at 256 pixels, counted total
    "S/8": (33, 0.36, 33_148_160),
    "S/4": (33, 1.41, 32_945_024),
    "S/2": (33, 6.06, 32_963_360),
    "B/8": (131, 1.42, 130_881_536),
    "B/4": (130, 5.56, 130_475_648),
    "B/2": (130, 23.01, 130_512_416),
    "L/8": (459, 5.01, 458_594_816),
    "L/4": (458, 19.70, 458_053_760),
    "L/2": (458, 80.71, 458_102_816),
    "XL/8": (676, 7.39, 675_683_072),
    "XL/4": (675, 29.05, 675_074_432),
    "XL/2": (675, 118.64, 675_129_632),
}


def _config(size: str, patch_size: int) -> DiTConfig:
    depth, hidden_size, heads = _SIZES[size]
    return DiTConfig(
        hidden_size=hidden_size, depth=depth, mixer=AttentionConfig(num_heads=heads), patch_size=patch_size
    )


def _paper(title: str) -> Preset:
    size, patch_size = title.split("/")
    millions, gmacs, total = _PUBLISHED[title]
    name = f"dit-{size.lower()}-{patch_size}"
    published = Published(millions, gmacs, total)
    return Preset(name, f"DiT-{title}", _config(size, int(patch_size)), "arXiv:2212.09748 tab. 4", published)


def _variant(kind: ConditioningKind, suffix: str, millions: float, gmacs: float) -> Preset:
    config = replace(_config("XL", 2), conditioning=kind)
    title = f"DiT-XL/2 {suffix.replace('-', ' ')}"
    return Preset(f"dit-xl-2-{suffix}", title, config, "arXiv:2212.09748 fig. 5", Published(millions, gmacs))


DIT: tuple[Preset, ...] = (
    *(_paper(title) for title in _PUBLISHED),
    Preset(
        "dit-xl-2-512",
        "DiT-XL/2 512",
        replace(_config("XL", 2), sample_size=(64, 64)),
        "arXiv:2212.09748 tab. 4",
        Published(675, 524.60, 676_014_368),
    ),
    _variant("in_context", "in-context", 449, 119.37),
    _variant("cross_attention", "cross-attention", 598, 137.62),
    _variant("adaln", "adaln", 600, 118.56),
)
