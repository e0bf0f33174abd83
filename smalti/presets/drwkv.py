"""Diffusion-RWKV: five sizes with patches of 2 and 4, for latents at 256 and 512 pixels, CIFAR-10 and CelebA-64.

Source: Fei et al. 2024, arXiv:2404.04478, and the sizes of its released code; totals counted on the released classes.
Printed are 39 M parameters of S/2 for CIFAR-10, and 779 M of H/2 for 512 pixels by a later paper that compares with it
(Lu & Song 2024, arXiv:2410.11081). B has the width of S; its depth is what differs.
"""

from smalti.models import DRWKVConfig
from smalti.presets.preset import Preset, Published

_SIZES = {"S": (13, 384), "B": (25, 384), "M": (25, 512), "L": (37, 768), "H": (37, 1024)}  # depth, hidden size

_DATA = {  # suffix of the name and of the title, sample size, channels, classes
    "": ("", 32, 4, 1000),
    "-512": (" 512", 64, 4, 1000),
    "-cifar10": (" CIFAR-10", 32, 3, 0),
    "-celeba64": (" CelebA-64", 64, 3, 0),
}

_TOTALS = {  # in the order of _DATA
    "S/2": (39_323_552, 39_618_464, 38_934_552, 39_229_464),
    "S/4": (39_305_216, 39_378_944, 38_902_368, 38_976_096),
    "B/2": (74_793_632, 75_088_544, 74_404_632, 74_699_544),
    "B/4": (74_775_296, 74_849_024, 74_372_448, 74_446_176),
    "M/2": (132_623_904, 133_017_120, 132_105_240, 132_498_456),
    "M/4": (132_599_424, 132_697_728, 132_062_304, 132_160_608),
    "L/2": (439_352_096, 439_941_920, 438_574_104, 439_163_928),
    "L/4": (439_315_328, 439_462_784, 438_509_664, 438_657_120),
    "H/2": (780_313_632, 781_100_064, 779_276_312, 780_062_744),
    "H/4": (780_264_576, 780_461_184, 779_190_368, 779_386_976),
}

_PRINTED = {("S/2", "-cifar10"): 39, ("H/2", "-512"): 779}  # millions of parameters


def _preset(title: str, suffix: str, total: int) -> Preset:
    size, patch_size = title.split("/")
    depth, hidden_size = _SIZES[size]
    words, side, channels, classes = _DATA[suffix]
    config = DRWKVConfig(
        hidden_size=hidden_size,
        depth=depth,
        patch_size=int(patch_size),
        sample_size=(side, side),
        in_channels=channels,
        num_classes=classes,
    )
    name = f"drwkv-{size.lower()}-{patch_size}{suffix}"
    published = Published(_PRINTED.get((title, suffix)), None, total)
    return Preset(name, f"DRWKV-{title}{words}", config, "arXiv:2404.04478, released code", published)


DRWKV: tuple[Preset, ...] = tuple(
    _preset(title, suffix, total)
    for title, totals in _TOTALS.items()
    for suffix, total in zip(_DATA, totals, strict=True)
)
