"""`smalti sample`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smalti.sampling import SamplingConfig
from smalti.workflows.sample_request import SampleSettings
from smalti.workflows.sample_set import sample_set
from smalti.world import World


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a trained model: one PNG per seed or one file of all, a grid, and the settings beside them.

    For many images, start the same command in as many processes as you like (torchrun, by hand, as a job array): they
    share the work. Killed or stopped, the same command goes on where it was.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Run folder or model folder."""
    classes: tuple[str, ...] = ()
    """Class names or numbers, used in turn. Left out: as --labels says."""
    label_rule: Annotated[Literal["random", "balanced"], tyro.conf.arg(name="labels")] = "random"
    """Without --classes: uniform at random, from each seed, as the papers do; or every class equally often."""
    seeds: str = "0-15"
    """One image each, e.g. 0-49 or 3,7,20-29; an image depends on its seed, not on its neighbours."""
    out: Path = Path("samples")
    """Folder for the images, of one set each."""
    save: tuple[Literal["png", "npz"], ...] = ("png",)
    """SEED.png for each image, or samples.npz with all of them in the layout of ADM's evaluation, or both."""
    codec: str = ""
    """Of models of latents: folder or hub name of their autoencoder. Left out: where it lay when they were trained."""
    other_decoder: bool = False
    """Accept a --codec with the same encoder and another decoder, such as ft-MSE in place of ft-EMA."""
    overwrite: bool = False
    """Where --out holds another set of samples, remove that one first."""
    chunks: str = ""
    """Only the chunks a:b (numbers from 0, b not included), for job arrays. Left out: whichever are missing."""
    chunk_size: int | None = None
    """Images a chunk, the unit that is shared out and stored. Left out: 64, or the next multiple of micro_batch."""
    micro_batch: int = 16
    """Images at once; part of what makes the bits, so it is recorded."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster on GPUs and on CPUs with bf16 units; part of what makes the bits."""
    inference: Literal["none", "eager", "frozen"] = "none"
    """As trained; merged for speed (eager); or compiled as well, in minutes (frozen). Bits differ; it is recorded."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: int | None = None
    """Threads on a CPU; part of what makes the bits. Left out: as the processes before it, or torch's own number."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(sampler="dpm-solver++", num_inference_steps=25, guidance_scale=2.0)
    )
    """How to draw them."""

    def run(self) -> None:
        result = sample_set(SampleSettings(**vars(self)))
        if World.launched().rank:
            return  # all come to the same end, and one says so
        if result.note:
            print(result.note, file=sys.stderr)
        for path in result.outputs:
            print(path)
