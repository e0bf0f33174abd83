"""`smalti encode`."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smalti.workflows.encode import EncodeSettings, encode
from smalti.world import World


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Turn images into latents, once, for training in the space of an autoencoder.

    Stores the mean and the spread of each posterior, so that training draws anew in every epoch. For many images, start
    the same command in as many processes as you like (torchrun, by hand, as a job array): they share the work. Killed
    or stopped, the same command goes on where it was.
    """

    source: Annotated[str, tyro.conf.Positional]
    """Image set (emoji32), folder of images, or tar shards."""
    codec: str
    """Autoencoder: a folder in diffusers' layout, or a repository owner/name on the Hugging Face hub."""
    out: Path = Path("latents")
    """Folder for the latents, of one set each."""
    image_size: int | None = None
    """Side in pixels to scale and crop to, as ADM does. Left out: as the images are."""
    flips: Literal["none", "stored"] = "none"
    """stored: encode every mirrored image as well, for training with --data.flip; twice the size."""
    limit: int | None = None
    """Only the first so many images."""
    batch: int | None = None
    """Images at once; part of what makes the bits. Left out: by their size, 4 of 256 x 256 pixels."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the autoencoder; bf16 is faster on GPUs and changes latents by about half a percent."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    chunks: str = ""
    """Only the chunks a:b (numbers from 0, b not included), for job arrays. Left out: whichever are missing."""
    chunk_rows: int | None = None
    """Images a chunk, the unit that is shared out and stored. Left out: 64 MiB of latents, at most 4096."""
    threads: int | None = None
    """Threads on a CPU; part of what makes the bits. Left out: as the processes before it, or torch's own number."""
    skip_unreadable: bool = False
    """Leave out files that cannot be read, instead of refusing the folder."""

    def run(self) -> None:
        result = encode(EncodeSettings(**vars(self)))
        if World.launched().rank:
            return  # all come to the same end, and one says so
        if result.note:
            print(result.note, file=sys.stderr)
        if result.record.complete:
            identity = result.record.identity
            channels, rows, columns = identity.latent_shape
            print(
                f"{self.out}: {identity.count:,} examples, latents {channels} x {rows} x {columns} of images "
                f"{identity.image_size[0]} x {identity.image_size[1]}, codec {identity.codec.label}; "
                f"train on them with `smalti train --data.path {shlex.quote(str(self.out))}`"
            )
