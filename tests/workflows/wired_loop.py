"""Run by test_wired.py in a process of its own, because it forks: what is wired together behind `smalti train`.

Prints one JSON object per part that was asked for. The parent imports torch once; every child runs the real command.
"""

import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import tiny_vae
import torch
from PIL import Image
from processes import PATIENCE, Crew, begin
from stop_loop import log_of
from tiny_runs import flags, scramble, write_set

import smalti.workflows.train as workflow
import smalti.workflows.train_looks as looks
import smalti.workflows.train_setup as setup
from smalti.checkpoints import CheckpointStore
from smalti.cli import main
from smalti.data import load_image_set
from smalti.errors import DataError
from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.metric import Metric, Values
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.networks import NETWORKS
from smalti.training import loop
from smalti.training.status import read_status
from smalti.workflows.encode import EncodeSettings, encode

IMAGES = 70  # three pieces of at most 32


class Means:
    """The mean and the spread of each channel as features."""

    identity = NetworkIdentity("means", "none", "none")
    widths = {"pool": 6}  # noqa: RUF012

    def __call__(self, images):
        numbers = images.double()
        return {"pool": torch.cat([numbers.mean(dim=(2, 3)), numbers.std(dim=(2, 3))], dim=1).float()}


def _digest(ours, reference, groups):
    """A number that says whether the features are the same bits in the same order, of both sets."""
    places = torch.arange(1, 1 + len(ours.rows("pool")), dtype=torch.float64)
    theirs = torch.arange(1, 1 + len(reference.rows("pool")), dtype=torch.float64)
    value = places @ ours.rows("pool").double() + theirs.sin()[None] @ reference.rows("pool").double()
    return {"digest": Values(value.flatten().sum().item(), ())}


def crew(root, name, size, arguments, prepare=lambda rank: None):
    def work(rank):
        workflow.tensorboard_installed = lambda: False
        prepare(rank)
        return main(arguments)

    return Crew(size, work, root / name)


def one(root, name, arguments, prepare=lambda rank: None):
    return crew(root, name, 1, arguments, prepare).wait(PATIENCE)[0]


def text(root, name, rank=0):
    return (root / f"{name}-{rank}.txt").read_text()


def contents(out):
    """Every byte of the newest checkpoint and of the finished model."""
    newest = CheckpointStore(out / "checkpoints").load_newest(on_skip=print)
    files = [*newest.path.glob("*.safetensors"), newest.path / "state.json", out / "model" / "model.safetensors"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def shared_looks(root, data):
    """Samples for pictures and metrics by one process and by several, of weights that are the same."""
    found = {}
    for name, size, strategy in (("one", 1, "auto"), ("ddp", 2, "ddp"), ("ddp3", 3, "ddp"), ("fsdp", 2, "fsdp")):
        out = root / name

        def prepare(rank, out=out):
            NETWORKS["means"] = lambda rest, device: Means()
            METRICS["digest"] = Metric("Digest", "lower", ("pool",), "features", _digest, "mean")
            build, draw = setup.build_backbone, looks.sample_latents

            def scrambled(model):
                network = build(model)
                scramble(network)
                return network

            def watched(*args, **kwargs):
                with (out.parent / f"{out.name}-drawn-{rank}.txt").open("a") as told:
                    told.write(f"{len(kwargs['seeds'])}\n")
                return draw(*args, **kwargs)

            setup.build_backbone, looks.sample_latents = scrambled, watched

        more = ["--sample-every", "1", "--quality.every", "1", "--quality.images", str(IMAGES), "--quality.features"]
        more += ["means", "--quality.metrics", "digest", "--optimizer.learning-rate", "1e-30", "--steps", "1"]
        more += ["--quality.reference-images", "70", "--parallel.strategy", strategy]
        codes = crew(root, f"looks-{name}", size, flags(out, data, *more), prepare).wait(PATIENCE)
        quality = [line for line in log_of(out) if line["event"] == "quality"]
        drawn = [root / f"{name}-drawn-{rank}.txt" for rank in range(size)]
        found[name] = {
            "codes": codes,
            "digest": [line["digest"] for line in quality],
            "picture": hashlib.sha256((out / "samples" / "step-0000001.png").read_bytes()).hexdigest(),
            "drawn": [[int(n) for n in path.read_text().split()] if path.exists() else [] for path in drawn],
        }
    return found


def first_look(root, data):
    """Several processes meet images that none of them knows; and one that cannot read them."""
    found = {}
    folder = root / "images"
    emoji = load_image_set("emoji32")
    for k in range(48):
        place = folder / f"class {k % 3}" / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(emoji.read(k)).save(place)

    def watch(broken=None, slow=0.0):
        def prepare(rank):
            real = setup.load_examples

            def load(*args, **kwargs):
                with (root / "loads.txt").open("a") as told:
                    told.write(f"{rank} begins\n")
                if rank == 0:
                    time.sleep(slow)
                if rank == broken:
                    raise DataError("the disk of one machine is not mounted")
                examples = real(*args, **kwargs)
                with (root / "loads.txt").open("a") as told:
                    told.write(f"{rank} has them\n")
                return examples

            setup.load_examples = load

        return prepare

    more = ["--data.image-size", "8", "--data.validation-fraction", "0", "--steps", "2", "--batch-size", "6"]
    arguments = flags(root / "first", folder, *more)
    codes = crew(root, "first", 3, arguments, watch(slow=0.5)).wait(PATIENCE)
    found["order"] = {"codes": codes, "loads": (root / "loads.txt").read_text().splitlines()}
    for broken in (0, 1):
        (root / f"broken{broken}").mkdir()
        started = time.monotonic()
        arguments = flags(root / f"broken{broken}", folder, *more)
        codes = crew(root, f"broken{broken}", 2, arguments, watch(broken)).wait(PATIENCE)
        status = read_status(root / f"broken{broken}")
        found[f"broken{broken}"] = {
            "codes": codes,
            "seconds": time.monotonic() - started,
            "said": [text(root, f"broken{broken}", rank).strip().splitlines()[-1] for rank in (0, 1)],
            "mark": [status.kind, status.values.get("exit_code"), status.retry],
        }
    return found


def marks(root, data):
    """What a run folder says after each kind of end, and that the next start takes it away."""
    found = {}

    def note(name, code, out):
        status = read_status(out)
        word = [path.name for path in out.iterdir() if path.name in ("PREEMPTED", "FAILED", "FINISHED")]
        found[name] = [code, status.kind, status.values.get("exit_code"), status.retry, word]
        return status

    def spoil(rank):
        real = loop.training_losses
        loop.training_losses = lambda *a, **k: (r := real(*a, **k))._replace(loss=r.loss * math.nan)

    out = root / "marked"
    base = flags(out, data)
    note("not finite", one(root, "marks", [*base, "--guard.skip-budget", "1"], spoil), out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "config.yaml").unlink()

    def stop_at(step, number):
        def prepare(rank):
            real = workflow.train_steps

            def steps(*args):
                for report in real(*args):
                    if report.step == step:
                        os.kill(os.getpid(), number)
                    yield report

            workflow.train_steps = steps

        return prepare

    status = note("stopped", one(root, "marks", base, stop_at(2, signal.SIGTERM)), out)
    found["stopped at"] = [status.values.get("step"), status.values.get("signal")]
    note("killed", one(root, "marks", base, stop_at(4, signal.SIGKILL)), out)
    note("other settings", one(root, "marks", [*base, "--seed", "7"]), out)
    hidden = data.with_name("hidden")
    data.rename(hidden)
    note("no data", one(root, "marks", base), out)
    hidden.rename(data)
    note("finished", one(root, "marks", base), out)
    note(
        "two stopped", max(crew(root, "two", 2, flags(root / "two", data), stop_at(3, 15)).wait(PATIENCE)), root / "two"
    )
    note("two finished", max(crew(root, "two", 2, flags(root / "two", data)).wait(PATIENCE)), root / "two")
    return found


def _tar(path, data):
    path.parent.mkdir(parents=True)
    images = np.load(data / "images.npy")
    for shard in range(3):
        with tarfile.open(path.parent / f"{path.name}-{shard}.tar", "w") as archive:
            for k in range(shard * 32, shard * 32 + 32):
                buffer = io.BytesIO()
                Image.fromarray(images[k]).save(buffer, "PNG")
                for name, body in ((f"{k:04}.png", buffer.getvalue()), (f"{k:04}.cls", str(k % 4).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(body)
                    archive.addfile(info, io.BytesIO(body))
    return path.parent


def workers(root, data):
    """Shards and latents read by two workers: the bits of none, also when the run is stopped on the way."""
    found = {}
    vae = tiny_vae.saved(root / "vae", scaling_factor=0.7)
    given = {"codec": str(vae), "limit": 64, "chunk_rows": 16, "flips": "stored", "device": "cpu", "threads": 1}
    encode(EncodeSettings(source="emoji32", out=root / "latents", **given))
    shards = _tar(root / "shards" / "train", data)
    for name, path, more in (
        ("shards", shards, ["--data.image-size", "16", "--data.shuffle", "blocks", "--data.shuffle-window", "2"]),
        ("latents", root / "latents", ["--data.flip", "--data.validation-fraction", "0"]),
    ):
        plain, ahead = flags(root / f"{name}-0", path, *more), flags(root / f"{name}-2", path, *more)
        codes = [one(root, name, plain)]
        codes += [one(root, name, [*ahead, "--data.workers", "2", "--steps", str(steps)]) for steps in (3, 6)]
        found[name] = {"codes": codes, "same": contents(root / f"{name}-0") == contents(root / f"{name}-2")}
    return found


def mirrored(root, data):
    """A run whose disk is lost goes on from the mirror; a run of other settings does not."""
    out, mirror = root / "lost", root / "mirror"
    more = ["--store.mirror", f"file://{mirror}"]
    codes = [
        one(root, "mirrored", flags(root / "whole", data)),
        one(root, "mirrored", flags(out, data, *more, "--steps", "4")),
    ]
    shutil.rmtree(out)
    codes.append(one(root, "mirrored", flags(out, data, *more)))
    first = min(line["step"] for line in log_of(out) if line["event"] == "train")
    same = contents(out) == contents(root / "whole")
    refused = {}
    for name, changed in (("seed", ["--seed", "3"]), ("images", [])):
        other = data if name == "seed" else write_set(root / "other" / "data", first=5)
        if name == "images":  # another set under the same path
            data.rename(data.with_name("aside"))
            other.rename(data)
        code = one(root, f"refused-{name}", flags(root / f"new-{name}", data, *more, *changed))
        refused[name] = [code, text(root, f"refused-{name}").strip().splitlines()[-1]]
    return {"codes": codes, "first": first, "same": same, "refused": refused}


if __name__ == "__main__":
    begin("smalti.cli.train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor")
    root, part = Path(sys.argv[1]), sys.argv[2]
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    print(json.dumps({part: globals()[part](root, write_set(root / "data"))}), flush=True)
