"""Run by test_full_disk.py in a process of its own, because it forks: commands on a disk with ever more room.

Arguments: an empty folder, a folder on the disk, what to run (one of KINDS), and how the disk is full: `disk`, a file
beside the output leaves only so much room; `limit`, no file of the command may be larger. Prints one JSON object per
line. First the command is run where there is room. Then, for every amount of room, it is run until it stops, and again
when the disk is empty.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import tiny_vae
import torch
from processes import begin, end_with_parent
from tiny_models import write_tiny_model
from tiny_runs import flags, write_set

from smalti.checkpoints import CheckpointStore
from smalti.cli import main
from smalti.training.log import read_log
from smalti.training.status import read_status


def run(arguments, limit=None):
    """The command in a fork: its exit code, and what it said, through a pipe, which no limit is about."""
    reader, writer = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        code = 99
        try:
            end_with_parent(parent)
            os.close(reader)
            os.dup2(writer, 2)  # for a traceback, too
            with (
                open(writer, "w", buffering=1) as out,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(out),
            ):
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                code = main(arguments)
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, errors="replace") as text:
        said = text.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def digest(data):
    return hashlib.sha256(data).hexdigest()


class Train:
    """Four checkpoints, pictures, a log, TensorBoard and a model."""

    def __init__(self, root):
        self.data = write_set(root / "data")

    def command(self, out):
        return flags(out, self.data, "--steps", "8", "--sample-every", "4")

    def newest(self, out):
        return CheckpointStore(out / "checkpoints").load_newest(on_skip=sys.exit)

    def stored(self, out):
        found = self.newest(out)
        return 0 if found is None else found.step

    def kept(self, before, out, said):
        """The next start goes on from there."""
        return f"at step {before}" in said if before else "continuing" not in said

    def bits(self, out):
        found = self.newest(out)
        tensors = {
            f"{group}.{name}": digest(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for group, members in found.tensors.items()
            for name, tensor in members.items()
        }
        log = [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_log(out)]
        files = {path.name: digest(path.read_bytes()) for path in [*out.glob("model/*"), *out.glob("samples/*")]}
        return tensors, found.step, found.state, log, files, read_status(out).kind


class Encode:
    """Chunks and an index; one that is stored is not made again."""

    def __init__(self, root):
        self.vae = tiny_vae.saved(root / "vae", scaling_factor=0.7)

    def command(self, out):
        fixed = "--limit 48 --chunk-rows 8 --batch 8 --flips stored --device cpu --threads 1"
        return ["encode", "emoji32", "--codec", str(self.vae), "--out", str(out), *fixed.split()]

    def stored(self, out):
        return {path: path.stat().st_ino for path in out.glob("chunk-*")}

    def kept(self, before, out, said):
        return before.items() <= self.stored(out).items()

    def bits(self, out):
        return {str(path.relative_to(out)): digest(path.read_bytes()) for path in out.rglob("*") if path.is_file()}


class Sample(Encode):
    """Chunks, which are gone at the end, a picture per seed and all in one file."""

    def __init__(self, root):
        self.model = write_tiny_model(root / "model")

    def command(self, out):
        fixed = "--sampling.num-inference-steps 1 --sampling.guidance-scale 1 --device cpu --threads 1 --micro-batch 20"
        what = ["sample", str(self.model), "--out", str(out), "--save", "png", "npz", "--chunk-size", "20"]
        return [*what, "--seeds", "0-99", *fixed.split()]

    def stored(self, out):
        return len(list(out.glob(".chunks-*/chunk-*.safetensors")))

    def kept(self, before, out, said):
        return True  # nothing is left of them to tell by; the picture and the pixels are compared


KINDS = {"train": Train, "encode": Encode, "sample": Sample}


def fill(filler, room):
    """Leave so many bytes free."""
    with filler.open("wb") as file:
        disk = os.statvfs(filler.parent)
        os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - room))


def attempt(kind, out, room, how):
    """What became of the command with so much room, and of the same command afterwards."""
    if how == "disk":
        fill(out.parent / "filler", room)
        code, said = run(kind.command(out))
        (out.parent / "filler").unlink()
    else:
        code, said = run(kind.command(out), room)
    before = kind.stored(out)
    again, then = run(kind.command(out))
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("smalti: ")]
    found = {"room": room, "code": code, "said": lines, "traceback": "Traceback" in said, "stored": bool(before)}
    return found | {"again": again, "kept": kind.kept(before, out, then)}


if __name__ == "__main__":
    root, disk, name, how, *amounts = sys.argv[1:]
    begin(f"smalti.cli.{name}", "torch._dynamo")
    root = Path(root)
    kind, out = KINDS[name](root), Path(disk) / "out"
    code, said = run(kind.command(root / "whole"))
    assert code == 0, said
    whole = kind.bits(root / "whole")
    for room in map(int, amounts):
        print(json.dumps(attempt(kind, out, room, how) | {"same": kind.bits(out) == whole}), flush=True)
        shutil.rmtree(out)
