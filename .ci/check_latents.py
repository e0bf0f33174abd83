"""Fail unless the latent path did what it is for: `check_latents.py RUN`, the folder of tools/demo_latents.py.

Every measure is taken a second time of a planted fault, which it has to tell from what is right; a check that passes
both fails. Then encoding and training are killed on the way, and have to end in the same bytes as when they are not.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from smalti.data import load_image_set, split, to_uint8
from smalti.data.latent_set import open_latents
from smalti.data.pixels import read_images, read_pixels
from smalti.latents import AutoencoderCodec, Codec, load_codec
from smalti.training.autoencoder import AutoencoderConfig, new_autoencoder, save_autoencoder
from smalti.workflows.autoencoder import psnr

ABOVE_BLUR = 4.0  # dB by which reconstructions beat images of a quarter of the size, drawn large again
SIZE = (650, 864)
PATIENCE = 180  # seconds that a killed command gets

failed: list[str] = []


def require(name: str, right: float, holds: Callable[[float], bool], **faults: float) -> None:
    """The right value has to hold, and that of every planted fault must not."""
    texts = [f"{right:.4g}", *(f"{fault.replace('_', ' ')} {value:.4g}" for fault, value in faults.items())]
    print(f"{name}: {'; '.join(texts)}", flush=True)
    if not holds(right):
        failed.append(f"{name}: {right:.4g} is not enough")
    failed.extend(f"{name}: {fault} passes, {value:.4g}" for fault, value in faults.items() if holds(value))


def main() -> int:
    run = Path(sys.argv[1])
    result = json.loads((run / "result.json").read_text())
    check_codec(run)
    check_network(result)
    with tempfile.TemporaryDirectory() as place:
        check_protocol(run, result, Path(place))
        check_kills(run, Path(place))
    with Image.open(run / "latents.png") as picture:
        picture.load()
        colours = len(picture.convert("RGB").getcolors(1 << 20) or [])
        print(f"picture: {picture.size}, {colours} colours")
        if picture.size != SIZE or colours < 100:
            failed.append(f"latents.png is {picture.size} of {colours} colours, expected {SIZE} of more than 100")
    for line in failed:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if failed else 0


def check_codec(run: Path) -> None:
    """Reconstructions of images set aside, and of the latents as they are stored, in dB."""
    images, codec = load_image_set("emoji32"), load_codec(run / "vae")
    held_out = split(images, 0.125, 0).validation.tolist()
    pixels, x = read_pixels(images, held_out), read_images(images, held_out)
    small = F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True)
    blurred = psnr(to_uint8(F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1)), pixels)
    other = untrained(codec)

    def score(latents: torch.Tensor, by: Codec = codec) -> float:
        return psnr(to_uint8(by.decode(latents)), pixels)

    def faults(latents: torch.Tensor) -> dict[str, float]:
        return {
            "twice_the_scale": score(2 * latents),
            "half_the_scale": score(latents / 2),
            "channels_swapped": score(latents[:, [1, 0, 2, 3]]),
            "rows_and_columns_swapped": score(latents.transpose(-1, -2)),
            "decoder_of_another": score(latents, other),
        }

    bar = blurred + ABOVE_BLUR
    name = f"reconstructed, dB (blurred images {blurred:.2f}, at least {bar:.2f})"
    mean = codec.encode(x).mean
    require(name, score(mean), lambda value: value >= bar, **faults(mean))
    stored = open_latents(run / "latents").moments(held_out, [0] * len(held_out))[:, 0]
    require(f"from the stored latents, {name}", score(stored), lambda value: value >= bar, **faults(stored))


def untrained(codec: Codec) -> Codec:
    """Another decoder: of the same shape, before its training."""
    assert isinstance(codec, AutoencoderCodec)
    network = new_autoencoder(AutoencoderConfig(seed=1), (32, 32), torch.device("cpu")).network.eval()
    return AutoencoderCodec(network, codec.facts)


def check_network(result: dict) -> None:
    """Below the best linear denoiser on latents that it has not seen; its samples between noise and real images."""
    line = result["linear"]
    name = f"validation loss of the network, below {line:.4f}, the best linear denoiser's"
    require(name, result["validation"], lambda value: value < line, mean_of_all=result["constant"])
    for metric in ("kid", "fd_pca64"):
        quality = {name: estimates[metric] for name, estimates in result["quality"].items()}
        noise, floor = quality["noise, decoded"], quality["reconstructions"]
        real = quality["held-out set"]["value"]
        print(f"{metric}: held-out set {real:.4g}")
        bar = noise["low"] * 2 / 3
        require(f"{metric} of samples, below two thirds of noise's", quality["samples"]["value"],
                lambda value, bar=bar: value < bar, noise=noise["value"])  # fmt: skip
        require(f"{metric} of reconstructions, between real images and samples", floor["value"],
                lambda value, real=real, most=quality["samples"]["high"]: real <= value < most,
                noise=noise["value"])  # fmt: skip


def check_protocol(run: Path, result: dict, place: Path) -> None:
    """Who decoded the samples is written down, and another one is refused."""
    codec = load_codec(run / "vae")
    if result["decoder"] != codec.facts.label:
        failed.append(f"the protocol names the decoder {result['decoder']}, not {codec.facts.label}")
    other, refused = place / "other", place / "refused"
    other.mkdir()
    save_autoencoder(other, new_autoencoder(AutoencoderConfig(seed=1), (32, 32), torch.device("cpu")).network)
    asked = smalti(["sample", str(run / "run"), "--codec", str(other), "--out", str(refused), "--seeds", "0"])
    said = asked.communicate(timeout=PATIENCE)[1].strip().splitlines()
    print(f"decoder: {result['decoder']}; another one: exit code {asked.returncode}, {' '.join(said[-1:])}")
    if asked.returncode == 0 or any(refused.glob("*.png")):
        failed.append("samples were drawn with the decoder of another autoencoder")


def smalti(command: list[str]) -> subprocess.Popen:
    """A process of its own."""
    return subprocess.Popen([sys.executable, "-m", "smalti", *command], stderr=subprocess.PIPE, text=True)


def finish(command: list[str]) -> None:
    """To its end, which has to be a good one."""
    process = smalti(command)
    said = process.communicate(timeout=PATIENCE)[1]
    if process.returncode:
        sys.exit(f"smalti {' '.join(command)} exits with {process.returncode}: {said[-600:]}")


def kill_when(command: list[str], reached: Callable[[], bool], ended: Callable[[], bool]) -> None:
    """kill -9 once there is something to continue from, and before there is nothing left to do."""
    process, deadline = smalti(command), time.monotonic() + PATIENCE
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL or not reached() or ended():
        failed.append(f"{command[0]} was not killed on the way, so that nothing is known of continuing it")


def check_kills(run: Path, place: Path) -> None:
    """Killed on the way, the same command ends in the same bytes."""
    again = place / "latents"
    encode = ["encode", "emoji32", "--codec", str(run / "vae"), "--out", str(again), "--chunk-rows", "256"]
    kill_when(encode, lambda: any(again.glob("chunk-*")), lambda: (again / "index.safetensors").exists())
    finish(encode)
    require_same("encoding", run / "latents", again)

    short = ["train", "--data.path", str(run / "latents"), "--model", "dit-emoji32", "--override", "patch_size=1",
             "--steps", "40", "--batch-size", "8", "--checkpoint-every", "4", "--validate-every", "0", "--sample-every",
             "0", "--out"]  # fmt: skip
    whole, killed = place / "whole", place / "run"
    finish([*short, str(whole)])
    marks = killed / "checkpoints"
    kill_when([*short, str(killed)], lambda: any(marks.glob("step-*")), lambda: (killed / "model").exists())
    finish([*short, str(killed)])
    last = "checkpoints/step-0000000040"
    require_same("training", whole / last, killed / last, "*.safetensors")


def require_same(what: str, right: Path, other: Path, pattern: str = "[!.]*") -> None:
    """Every file of the one, byte for byte in the other, and no other ones."""
    files, others = (
        {path.name: path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()}
        for folder in (right, other)
    )
    different = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
    print(f"{what}, killed and continued: {len(files)} files, {sum(map(len, files.values())):,} bytes, "
          f"{len(different)} differ")  # fmt: skip
    if different or not files:
        failed.append(f"{what}: killed and continued, {', '.join(different) or 'everything'} is not the same")


if __name__ == "__main__":
    sys.exit(main())
