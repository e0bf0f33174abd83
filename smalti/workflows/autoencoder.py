"""`autoencoder`: train a small autoencoder, and show what it makes of images that it has not seen."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import UInt8
from torch import Tensor

from smalti.checkpoints import CheckpointStore, RunLock
from smalti.config import to_dict
from smalti.data import SampleOrder, Split, load_image_set, split, to_uint8
from smalti.data.examples import PixelExamples
from smalti.data.pixels import read_images, read_pixels
from smalti.errors import ConfigError, PreemptedError
from smalti.latents import AutoencoderCodec, Codec, CodecFacts, load_codec
from smalti.latents.vae import KIND
from smalti.report.files import write_text
from smalti.report.images import save_grid
from smalti.storage.filesystem import LocalFileSystem, storage_errors
from smalti.training.autoencoder import (
    AutoencoderConfig,
    AutoencoderReport,
    AutoencoderState,
    autoencoder_steps,
    new_autoencoder,
    normalise,
    save_autoencoder,
)
from smalti.training.device import resolve_device
from smalti.training.log import RunLog, tensorboard_installed
from smalti.training.stop import StopRequest
from smalti.workflows.out_folder import check_folder, refuse_other_home
from smalti.workflows.progress import ProgressReport

SETTINGS, PICTURE = "autoencoder.yaml", "reconstruction.png"
_SHOWN, _COLUMNS = 40, 10
_ROWS = 64
# What may differ between two starts of one run.
_INCIDENTAL = {"out", "device", "log_every", "validate_every", "checkpoint_every"}


@dataclass(frozen=True)
class AutoencoderResult:
    """A finished autoencoder.

    Attributes:
        psnr: of images that it has not seen, in dB, the mean over images; None where none were set aside.
        spread: mean standard deviation of a posterior, where the latents have 1.
    """

    out: Path
    facts: CodecFacts
    psnr: float | None
    spread: float
    picture: Path


def train_autoencoder(
    config: AutoencoderConfig, *, on_step: Callable[[AutoencoderReport], None] | None = None
) -> AutoencoderResult:
    """Train, or continue what the folder holds, and store the result in diffusers' layout.

    The latents of the training images have mean 0 and standard deviation 1 in each channel, so `scaling_factor` is 1.

    Raises:
        PreemptedError: stopped on request; the run was saved and the same call continues it.
        SmaltiError: whatever else the user can mend.
    """
    check_folder(config.out, "--out")
    refuse_other_home(config.out, "--out", SETTINGS, config.data)
    device = resolve_device(config.device)
    examples = PixelExamples(load_image_set(config.data, config.image_size))
    images = examples.images
    CodecFacts(kind=KIND, factor=config.factor).latent_shape(images.image_size)
    parts = split(images, config.validation_fraction, config.seed, allow_empty=True)
    with RunLock(config.out):
        _settle(config, images.fingerprint)
        state = new_autoencoder(config, images.image_size, device)
        spread = _train(config, state, examples, parts, on_step)
    codec = load_codec(config.out, device=device)
    shown = (parts.validation if len(parts.validation) else parts.train)[:_SHOWN].tolist()
    picture = config.out / PICTURE
    _save_picture(codec, read_images(images, shown), picture)
    return AutoencoderResult(config.out, codec.facts, _measure(codec, examples, parts), spread, picture)


def psnr(images: UInt8[Tensor, "B C H W"], reference: UInt8[Tensor, "B C H W"]) -> float:
    """Peak signal-to-noise ratio of 8-bit images in dB, the mean over the images; 100 for equal ones."""
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / error.clamp_min(255**2 * 1e-10))).mean())


def _settle(config: AutoencoderConfig, fingerprint: str) -> None:
    """Refuse to continue another run; then write down what this one is."""
    now: dict[str, Any] = to_dict(config) | {"fingerprint": fingerprint}
    path = config.out / SETTINGS
    if path.exists():
        before = yaml.safe_load(path.read_text())
        other = [
            f"{name}: {before.get(name)} -> {value}"
            for name, value in now.items()
            if name not in _INCIDENTAL and before.get(name) != value
        ]
        if other:
            raise ConfigError(f"{config.out} holds another autoencoder ({'; '.join(other)}); choose another --out")
    write_text(path, yaml.safe_dump(now, sort_keys=False))


def _train(
    config: AutoencoderConfig,
    state: AutoencoderState,
    examples: PixelExamples,
    parts: Split,
    on_step: Callable[[AutoencoderReport], None] | None,
) -> float:
    """Returns the mean standard deviation of the posteriors, in the scale of the finished network."""
    store = CheckpointStore(config.out / "checkpoints", keep_last=1, sole_writer=True)
    order = SampleOrder(parts.train, config.seed)
    with StopRequest() as stop, ProgressReport("training", config.steps) as progress, ExitStack() as at_end:
        stored = store.load_newest(on_skip=lambda reason: progress.note(f"passed over {reason}"))
        if stored is not None:
            state.restore(stored)
            progress.note(f"continuing {config.out} at step {state.step}")
            progress.continue_from(state.step)
        log = RunLog(config.out, state.step if stored is not None else -1, tensorboard=tensorboard_installed())
        at_end.callback(log.close)
        for report in autoencoder_steps(state, examples, order, config):
            step, last = report.step, report.step == config.steps
            if on_step is not None:
                on_step(report)
            progress.update(step, f"loss {report.loss:.4f}")
            if last or step % config.log_every == 0:
                values = {name: value for name, value in vars(report).items() if name != "step"}
                log.write("train", step, **values)
            if config.validate_every and (last or step % config.validate_every == 0):
                found = _measure(_in_training(state), examples, parts)
                state.network.train()
                if found is not None:
                    log.write("validation", step, psnr=found)
                    progress.note(f"step {step:,}: {found:.2f} dB on images set aside")
            if last or step % config.checkpoint_every == 0 or stop.received:
                store.save(step, state.tensors(), {"step": step})
            if stop.received and not last:
                raise PreemptedError(
                    f"stopped by {stop.received.name} and saved at step {step}; the same command continues {config.out}"
                )
        state.network.eval()
        normalise(state.network, examples, parts.train.tolist())
        fs = LocalFileSystem()
        with storage_errors(fs, config.out, 0, "storing the autoencoder", "Its checkpoint is stored; make room"):
            save_autoencoder(config.out, state.network)
    few = read_images(examples.images, parts.train[:_ROWS].tolist())
    return float(_in_training(state).encode(few).std.mean())


def _in_training(state: AutoencoderState) -> Codec:
    """The network as it is now, without a copy; the caller puts it back into training."""
    config = state.network.config
    facts = CodecFacts(kind=KIND, channels=config.latent_channels, factor=2 ** (len(config.block_out_channels) - 1))
    return AutoencoderCodec(state.network, facts)


def _measure(codec: Codec, examples: PixelExamples, parts: Split) -> float | None:
    """PSNR of images set aside, each encoded as its mean."""
    held_out = parts.validation.tolist()
    if not held_out:
        return None
    found = []
    for start in range(0, len(held_out), _ROWS):
        pixels = read_pixels(examples.images, held_out[start : start + _ROWS])
        again = codec.decode(codec.encode(read_images(examples.images, held_out[start : start + _ROWS])).mean)
        found.append((len(pixels), psnr(to_uint8(again.cpu()), pixels)))
    return math.fsum(count * value for count, value in found) / len(held_out)


def _save_picture(codec: Codec, images: Tensor, path: Path) -> None:
    """Each image and beside it what the autoencoder makes of it."""
    again = codec.decode(codec.encode(images).mean).cpu().clamp(-1, 1)
    pairs = torch.stack([images, again], dim=1).flatten(0, 1)
    save_grid(pairs, path, columns=_COLUMNS)
