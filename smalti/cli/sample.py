"""`smalti sample`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smalti.sampling import SamplingConfig
from smalti.workflows.sample import sample_to_folder


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a trained model: one PNG per seed, a grid of all, and the settings beside them."""

    model: Annotated[Path, tyro.conf.Positional]
    """Run folder or model folder."""
    classes: tuple[str, ...] = ()
    """Class names or numbers, used in turn; none = drawn from each seed."""
    seeds: str = "0-15"
    """One image each, e.g. 0-49 or 3,7,20-29; an image depends on its seed, not on its neighbours."""
    out: Path = Path("samples")
    """Folder for the images."""
    micro_batch: int = 16
    """Images at once; part of what makes the bits, so it is recorded."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster on GPUs and on CPUs with bf16 units; part of what makes the bits."""
    inference: Literal["none", "eager", "frozen"] = "none"
    """The network as it was trained, merged and packed for speed (eager), or compiled as well (frozen, within minutes,
    for many images); the bits differ from mode to mode, so it is recorded."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(sampler="dpm-solver++", num_inference_steps=25, guidance_scale=2.0)
    )
    """How to draw them."""

    def run(self) -> None:
        grid = sample_to_folder(
            self.model,
            self.out,
            seeds=self.seeds,
            classes=self.classes,
            config=self.sampling,
            micro_batch=self.micro_batch,
            device=self.device,
            precision=self.precision,
            inference=self.inference,
        )
        print(grid)
