"""`make demo-latents`: the whole path in latent space, from images to numbers and a picture, with nothing downloaded.

Each step is a command, printed before it runs, so that the output of this is a recipe to copy from. The first start
times a few steps on this machine, chooses how many fit, and stores that in `plan.json`; interrupted, the same call goes
on.
"""

import argparse
import itertools
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from smalti.config import to_dict
from smalti.data import SampleOrder, load_image_set, split, to_uint8
from smalti.data.examples import PixelExamples
from smalti.data.pixels import read_images
from smalti.evaluation.results import read_result
from smalti.latents import Codec, load_codec
from smalti.models import DiTConfig, build_backbone
from smalti.nn.mixers import AttentionConfig
from smalti.report.files import replacing, write_text
from smalti.training.autoencoder import AutoencoderConfig, autoencoder_steps, new_autoencoder
from smalti.training.device import autocast
from smalti.training.log import read_log

SET, SEED, FRACTION = "emoji32", 0, 0.125
BATCH = 32
# All but training: starts of Python, validation, samples, features; about 70 seconds of processor time.
OTHER_SECONDS = 80.0
AUTOENCODER_SHARE = 0.5
TIMED_STEPS = 5
PER_CLASS, SHOWN = 8, 16
NOISE, RECONSTRUCTIONS, PICTURE, RESULT = "noise.npz", "reconstructions.npz", "latents.png", "result.json"
LABEL, ZOOM, GAP = 120, 2, 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the first start chose.

    Args:
        precision: of the network; the autoencoder is too narrow to gain from bf16.
        seconds: of one step of the autoencoder, and of the network.
    """

    minutes: float
    autoencoder_steps: int
    steps: int
    precision: str
    seconds: tuple[float, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-latents"))
    parser.add_argument("--minutes", type=float, default=12.0, help="budget on this machine, set at the first start")
    asked = parser.parse_args()
    started, out = time.monotonic(), asked.out
    plan = stored_plan(out) or make_plan(out, asked.minutes)
    for name, command in commands(out, plan):
        if name == "evaluate":
            write_images(out)
        run(command)
    picture(out)
    summary(out, plan, time.monotonic() - started)
    return 0


def commands(out: Path, plan: Plan) -> list[tuple[str, list[str]]]:
    """The recipe. The network is trained as in `smalti demo`, see docs/demo.md; its tokens are single latents."""
    vae, latents, run = str(out / "vae"), str(out / "latents"), str(out / "run")
    part = f"seed={SEED},fraction={FRACTION}"
    sampling = flags(sampler="dpm-solver++", num_inference_steps=20, guidance_scale=2, prefix="sampling.")
    return [
        ("autoencoder", ["autoencoder", *flags(
            data=SET, out=vae, steps=plan.autoencoder_steps, validate_every=-(-plan.autoencoder_steps // 4),
        )]),
        ("encode", ["encode", SET, *flags(codec=vae, out=latents, chunk_rows=256)]),
        ("check", ["data", "check", latents]),
        ("train", [
            "train",
            *flags(out=run, model="dit-emoji32", override="patch_size=1", steps=plan.steps, batch_size=BATCH),
            *flags(precision=plan.precision, validate_every=-(-plan.steps // 4), sample_every=0, checkpoint_every=100),
            *flags(path=latents, prefix="data."),
            *flags(schedule="flow", prediction="velocity", timestep_sampling="logit_normal", logit_mean=0.6,
                   prefix="objective."),
            *flags(learning_rate=2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, decay="cosine",
                   clip_norm=1, prefix="optimizer."),
        ]),
        ("sample", [
            "sample", run, *flags(out=out / "samples", classes=range(9), seeds=f"0-{9 * PER_CLASS - 1}"),
            *flags(precision=plan.precision, micro_batch=36), *sampling,
        ]),
        ("evaluate", [
            "evaluate", run, f"{SET}#validation,{part}", str(out / RECONSTRUCTIONS), str(out / NOISE),
            *flags(reference=f"{SET}#train,{part}", features="lite0@96", metrics=("kid", "fd_pca64"), training="none"),
            "--no-floor", *flags(images=len(held_out()), precision=plan.precision, micro_batch=60), *sampling,
            *flags(out=out / "evaluation"),
        ]),
    ]  # fmt: skip


def flags(prefix: str = "", **values: object) -> list[str]:
    """As the command line takes them."""
    found = []
    for name, value in values.items():
        each = value if isinstance(value, tuple | range) else (value,)
        found += [f"--{prefix}{name.replace('_', '-')}", *map(str, each)]
    return found


def run(command: list[str]) -> None:
    """A process of its own, as if typed; whatever it exits with, if not 0, ends this."""
    print(f"\n$ smalti {shlex.join(command)}", flush=True)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    code = subprocess.run([sys.executable, "-m", "smalti", *command], check=False).returncode
    if code:
        sys.exit(code)
    # On a machine that does something else as well, only the second number says what this took.
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(f"  ({time.monotonic() - started:.0f} s, {used:.0f} s of processor time)", flush=True)


def held_out() -> list[int]:
    """Images that neither the autoencoder nor the network is trained on."""
    return split(load_image_set(SET), FRACTION, SEED).validation.tolist()


def write_images(out: Path) -> None:
    """What the evaluation puts beside samples: the codec's own floor, and what its decoder makes of noise alone."""
    print(f"\n# {RECONSTRUCTIONS}: images set aside through the autoencoder; {NOISE}: noise through its decoder")
    codec, indices = load_codec(out / "vae"), held_out()
    images = read_images(load_image_set(SET), indices)
    noise = torch.randn(
        len(indices), *codec.facts.latent_shape((32, 32)), generator=torch.Generator().manual_seed(SEED)
    )
    for name, shown in ((RECONSTRUCTIONS, reconstructed(codec, images)), (NOISE, to_uint8(codec.decode(noise)))):
        with replacing(out / name) as path, path.open("wb") as file:
            np.savez(file, arr_0=shown.permute(0, 2, 3, 1).contiguous().numpy())


def reconstructed(codec: Codec, images: torch.Tensor) -> torch.Tensor:
    """uint8, each image encoded as its mean."""
    return to_uint8(codec.decode(codec.encode(images).mean))


def stored_plan(out: Path) -> Plan | None:
    path = out / "plan.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    return Plan(**values | {"seconds": tuple(values["seconds"])})


def make_plan(out: Path, minutes: float) -> Plan:
    """Steps for the time that is left, in the precision that is faster in sum."""
    first = pace(autoencoder())
    second = {precision: pace(network(precision)) for precision in ("fp32", "bf16")}
    precision = min(second, key=second.__getitem__)
    left = max(30.0, minutes * 60 - OTHER_SECONDS)
    plan = Plan(
        minutes=minutes,
        autoencoder_steps=max(100, int(left * AUTOENCODER_SHARE / first)),
        steps=max(100, int(left * (1 - AUTOENCODER_SHARE) / second[precision])),
        precision=precision,
        seconds=(first, second[precision]),
    )
    print(
        f"seconds a step: autoencoder {first:.3f}, network {second['fp32']:.3f} in fp32, {second['bf16']:.3f} in bf16; "
        f"{plan.autoencoder_steps} and {plan.steps} steps for {minutes:g} minutes",
        flush=True,
    )
    write_text(out / "plan.json", json.dumps(asdict(plan), indent=1) + "\n")
    return plan


def pace(steps: Iterator[object]) -> float:
    """Median seconds; the first two warm up."""
    marks = [time.perf_counter() for _ in itertools.islice(steps, TIMED_STEPS + 2)][1:]
    pauses = sorted(b - a for a, b in itertools.pairwise(marks))
    return pauses[len(pauses) // 2]


def autoencoder() -> Iterator[object]:
    """Training steps of one that is thrown away."""
    config = AutoencoderConfig()
    images = load_image_set(SET)
    state = new_autoencoder(config, images.image_size, torch.device("cpu"))
    return autoencoder_steps(state, PixelExamples(images), SampleOrder(range(len(images)), SEED), config)


def network(precision: str) -> Iterator[None]:
    """Training steps of a network of the same size, which need no latents yet."""
    shape: dict = {"hidden_size": 192, "depth": 6, "in_channels": 4, "num_classes": 9, "learned_variance": False}
    model = build_backbone(DiTConfig(mixer=AttentionConfig(num_heads=3), patch_size=1, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    x, labels = torch.randn(BATCH, 4, 8, 8), torch.zeros(BATCH, dtype=torch.int64)
    while True:
        with autocast(torch.device("cpu"), precision):
            output = model(x, torch.full((BATCH,), 0.5), labels)
        (output.float() - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def picture(out: Path) -> None:
    """Originals that were set aside, what the autoencoder makes of them, and samples, a row for each class."""
    images, indices = load_image_set(SET), held_out()
    with np.load(out / RECONSTRUCTIONS) as file:
        again = file["arr_0"]
    chosen = np.linspace(0, len(indices) - 1, SHOWN).round().astype(int)
    originals = np.stack([images.read(indices[i]) for i in chosen])
    rows = [("set aside", originals[:PER_CLASS]), ("reconstructed", again[chosen[:PER_CLASS]]),
            ("set aside", originals[PER_CLASS:]), ("reconstructed", again[chosen[PER_CLASS:]])]  # fmt: skip
    for label, name in enumerate(images.class_names):
        files = [out / "samples" / f"{label + 9 * k:06d}.png" for k in range(PER_CLASS)]
        rows.append((name, np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])))
    side = ZOOM * originals.shape[1] + GAP
    sheet = Image.new("RGB", (LABEL + PER_CLASS * side + GAP, len(rows) * side + 3 * GAP), (235, 235, 235))
    draw = ImageDraw.Draw(sheet)
    for row, (name, shown) in enumerate(rows):
        top = GAP + row * side + (2 * GAP if row >= 4 else 0)
        draw.text((2 * GAP, top + side // 2 - 6), name, fill=(40, 40, 40))
        for column, pixels in enumerate(shown):
            tile = Image.fromarray(pixels).resize((side - GAP, side - GAP), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL + column * side, top))
    with replacing(out / PICTURE) as path:
        # In steps of 8 levels, which no eye sees and which halves the file.
        levels = (np.asarray(sheet, dtype=np.float32) / 8).round() * 8
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(path, "PNG", optimize=True)


def summary(out: Path, plan: Plan, seconds: float) -> None:
    """`result.json`, and the same as a table."""
    found = {}
    for path in (out / "evaluation").glob("*.json"):
        result = read_result(path)
        found[Path(result.source.path).name.partition("#")[0]] = result
    names = {"samples": "run", "reconstructions": RECONSTRUCTIONS, "held-out set": SET, "noise, decoded": NOISE}
    rows = {name: found[source] for name, source in names.items()}
    lines = [line for line in read_log(out / "run") if line["event"] in ("baseline", "validation")]
    validation = next(line["loss"] for line in reversed(lines) if line["event"] == "validation")
    baseline = next(line for line in lines if line["event"] == "baseline")
    sharpness = next(line["psnr"] for line in reversed(read_log(out / "vae")) if line["event"] == "validation")
    numbers = {
        "plan": asdict(plan),
        "seconds": seconds,  # of this start
        "psnr": sharpness,
        "validation": validation,
        "linear": baseline["linear"],
        "constant": baseline["constant"],
        "decoder": rows["samples"].protocol.decoder,
        "quality": {
            name: {number.metric: to_dict(number.estimate) for number in result.numbers}
            for name, result in rows.items()
        },
    }
    write_text(out / RESULT, json.dumps(numbers, indent=1) + "\n")
    print(f"\nautoencoder {sharpness:.2f} dB on images set aside; network {validation:.4f} on their latents, "
          f"best linear denoiser {baseline['linear']:.4f}")  # fmt: skip
    for name, values in numbers["quality"].items():
        print(f"{name:16} KID {values['kid']['value']:8.4f}   FD-PCA64 {values['fd_pca64']['value']:8.4f}")
    print(f"{out / PICTURE}, {seconds:.0f} s")


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    sys.exit(main())
