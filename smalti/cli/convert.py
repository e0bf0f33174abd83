"""`smalti convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smalti.presets import parse_overrides
from smalti.workflows.convert import Conversion, convert


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn released weights into a model folder, and a model folder into released or diffusers' form."""

    source: Annotated[str, tyro.conf.Positional]
    """What FILE is: facebookresearch/DiT (or only DiT), feizc/Diffusion-RWKV, YuchuanTian/U-DiT, diffusers, smalti."""
    file: Annotated[Path, tyro.conf.Positional]
    """Released weights (.pt, .pth, .bin, .safetensors), or a folder of diffusers or smalti."""
    out: Path | None = None
    """Folder to write; with `--to official` a .safetensors file. By default named after FILE, here."""
    to: Literal["smalti", "official", "diffusers"] = "smalti"
    """The form to write."""
    preset: str | None = None
    """The network it is; left out, the file's own settings are used, or the preset that has its shapes."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE")] = ()
    """Hyper-parameters under their released names, such as num_classes=10."""
    weights: Literal["auto", "ema", "model"] = "auto"
    """Which weights of a training checkpoint; auto takes the moving average if there is one."""

    def run(self) -> None:
        conversion = Conversion(
            source=self.source,
            file=self.file,
            out=self.out,
            to=self.to,
            preset=self.preset,
            settings=parse_overrides(self.settings),
            weights=self.weights,
        )
        print("\n".join(convert(conversion).lines))
