"""Small networks for 32x32 pixels, one of each backbone, of equal multiply-adds: what `smalti demo` compares.

Equal means per image of a batch of 32, scans and Fourier transforms included; `tests/presets` holds them within 5 %.
Widths and depths are ours: no paper has networks this small.
"""

from typing import Any

from smalti.models import DiffuSSMConfig, DiTConfig, DRWKVConfig, UDiTConfig
from smalti.nn.mixers import AttentionConfig, DownsampledAttentionConfig
from smalti.presets.preset import Preset

_SHARED: dict[str, Any] = {"in_channels": 3, "num_classes": 9, "learned_variance": False}
_SOURCE = "ours: minutes on two CPU cores"

EMOJI: tuple[Preset, ...] = (
    Preset(
        "dit-emoji32",
        "DiT for emoji32",
        DiTConfig(hidden_size=192, depth=6, mixer=AttentionConfig(num_heads=3), patch_size=4, **_SHARED),
        _SOURCE,
    ),
    Preset("diffussm-emoji32", "DiffuSSM for emoji32", DiffuSSMConfig(hidden_size=64, depth=5, **_SHARED), _SOURCE),
    Preset(
        "drwkv-emoji32",
        "Diffusion-RWKV for emoji32",
        DRWKVConfig(hidden_size=200, depth=5, patch_size=4, **_SHARED),
        _SOURCE,
    ),
    Preset(
        "udit-emoji32",
        "U-DiT for emoji32",
        UDiTConfig(hidden_size=20, depth=(1, 1, 2, 1, 1), mixer=DownsampledAttentionConfig(num_heads=1), **_SHARED),
        _SOURCE,
    ),
)
