"""U-DiT: the three sizes of the paper at 256 and 512 pixels, and their vanilla forms.

Source: Tian et al. 2024, arXiv:2405.02730. What it prints belongs to the network after `fuse()`;
totals before and after are counted on the released classes. One network serves both resolutions.
"""

from dataclasses import replace

from smalti.models import UDiTConfig
from smalti.nn.mixers import DownsampledAttentionConfig
from smalti.presets.preset import Preset, Published

_SIZES = {"S": (96, 4), "B": (192, 8), "L": (384, 16)}  # hidden size of the first stage, heads on every stage

_PUBLISHED = {  # millions of parameters and GMACs at 256 and 512 pixels, both fused; counted totals, trained and fused
    "S": (52.05, 6.04, None, 58_896_568, 52_045_240),
    "B": (204.43, 22.22, 106.7, 231_251_304, 204_425_064),
    "L": (810.19, 85.00, None, 916_335_304, 810_188_488),
}
_VANILLA = {"S": 5.91, "B": 21.96, "L": 84.48}  # GMACs at 256 pixels; no parameters are printed


def _config(size: str) -> UDiTConfig:
    hidden_size, heads = _SIZES[size]
    mixer = DownsampledAttentionConfig(num_heads=heads)
    return UDiTConfig(hidden_size=hidden_size, depth=(2, 5, 8, 5, 2), mixer=mixer)


def _paper(size: str) -> Preset:
    millions, gmacs, _, total, fused = _PUBLISHED[size]
    published = Published(millions, gmacs, total, fused)
    source = "arXiv:2405.02730, 256 pixels"
    return Preset(f"udit-{size.lower()}", f"U-DiT-{size}", _config(size), source, published)


def _larger(size: str) -> Preset:
    millions, _, gmacs, total, fused = _PUBLISHED[size]
    config = replace(_config(size), sample_size=(64, 64))
    source = "arXiv:2405.02730, 512 pixels" if gmacs else "arXiv:2405.02730 has B alone at 512"
    published = Published(millions, gmacs, total, fused)
    return Preset(f"udit-{size.lower()}-512", f"U-DiT-{size} 512", config, source, published)


def _vanilla(size: str) -> Preset:
    config = _config(size)
    plain = DownsampledAttentionConfig(num_heads=_SIZES[size][1], cosine=False, position="none")
    return Preset(
        f"udit-{size.lower()}-vanilla",
        f"U-DiT-{size} vanilla",
        replace(config, mixer=plain, mlp="basic"),
        "arXiv:2405.02730, vanilla",
        Published(gmacs=_VANILLA[size]),
    )


UDIT: tuple[Preset, ...] = tuple(make(size) for make in (_paper, _larger, _vanilla) for size in _SIZES)
