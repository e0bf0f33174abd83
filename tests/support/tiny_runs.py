"""Runs small enough to be started dozens of times: a network of some thousand weights, a hundred of the emoji."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from smalti.data import ArrayImages, load_image_set
from smalti.data.packed import PackedItems, pack_items
from smalti.sampling import SamplingConfig
from smalti.training.config import DataConfig, RunConfig

OVERRIDE = ("depth=1", "hidden_size=16", "num_heads=2")
QUICK = SamplingConfig(sampler="dpm-solver++", num_inference_steps=2, guidance_scale=2.0)


def write_set(folder: Path, count: int = 96, first: int = 0) -> Path:
    """A packed image set of evenly spaced emoji, all nine classes among them."""
    emoji = load_image_set("emoji32")
    chosen = [first + k * (len(emoji) - first) // count for k in range(count)]
    images = np.stack([emoji.read(k) for k in chosen])
    names = [emoji.item_names[k] for k in chosen]
    splits = [emoji.split_names[k] for k in chosen]
    labels = [int(emoji.class_labels[k]) for k in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.json").write_bytes(
        pack_items(PackedItems("tiny", emoji.class_names, names, splits, labels), images)
    )
    np.save(folder / "images.npy", images)
    return folder


def tiny_config(out: Path, data: Path, **changes) -> RunConfig:
    """A run of a few seconds at most."""
    config = RunConfig(
        out=out,
        override=OVERRIDE,
        data=DataConfig(path=str(data)),
        steps=6,
        batch_size=8,
        device="cpu",
        log_every=1,
        validate_every=3,
        sample_every=0,
        checkpoint_every=2,
        preview=QUICK,
    )
    return dataclasses.replace(config, **changes)


def flags(out: Path, data: Path, *more: str) -> list[str]:
    """The same run on the command line."""
    fixed = "--batch-size 8 --device cpu --log-every 1 --validate-every 3 --sample-every 0 --checkpoint-every 2"
    preview = "--preview.num-inference-steps 2"
    what = ["train", "--out", str(out), "--data.path", str(data), "--override", *OVERRIDE]
    return [*what, *fixed.split(), *preview.split(), *([] if "--steps" in more else ["--steps", "6"]), *more]


def array_images(images: np.ndarray, labels=None) -> ArrayImages:
    """Pixels as an image set, every image its own name."""
    names = tuple(f"image {k}" for k in range(len(images)))
    classes = () if labels is None else tuple(f"class {k}" for k in range(int(max(labels)) + 1))
    labels = np.zeros(0, dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
    return ArrayImages("made up", classes, labels, names, names, "0" * 64, images)


@torch.no_grad()
def scramble(network, seed: int = 0) -> None:
    """Every trainable weight random, so that no gradient is hidden behind a zero gate."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1, generator=generator)
