"""Run by test_sample_kills.py in a process of its own, because it forks: kill workers of one sample set at random.

Prints one JSON object. The parent imports torch once and forks every worker; a worker tells through a pipe of each
chunk that it stored.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from processes import begin, end_with_parent
from tiny_models import write_tiny_model

from smalti.cli import main
from smalti.sampling.record import read_record
from smalti.storage import filesystem
from smalti.storage.chunks import ChunkStore
from smalti.storage.filesystem import read_record as file_record

COUNT, CHUNK = 5000, 25
STOPPED = 75
WORLDS = (2, 3, 1)


class Worker:
    """`smalti sample` in a fork."""

    def __init__(self, arguments, rank, world, log, pipe):
        parent = os.getpid()
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            code = 99
            try:
                end_with_parent(parent)
                os.setpgrp()
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
                real = ChunkStore.write

                def told(store, index, tensors):
                    path = real(store, index, tensors)
                    os.write(pipe, struct.pack("q", index))
                    return path

                ChunkStore.write = told
                with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                    code = main(arguments)
            except BaseException:  # noqa: BLE001  (a fork must not return to the parent's code)
                traceback.print_exc()
            finally:
                os._exit(code)

    def end(self, number=None):
        """Send a signal if one is given, then the exit code (negative: killed by that signal)."""
        if self.code is None:
            if number is not None:
                os.kill(self.pid, number)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def running(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None


def command(model, out, count, *more):
    fixed = "--sampling.num-inference-steps 1 --sampling.guidance-scale 1 --device cpu --threads 1 --micro-batch 25"
    seeds = ["--seeds", f"0-{count - 1}", "--chunk-size", str(CHUNK)]
    return ["sample", str(model), "--out", str(out), *seeds, *fixed.split(), *more]


def stored(out):
    """Chunks that are there now; every one of them once the set is complete."""
    try:
        if read_record(out).complete:
            return None
    except ValueError:
        return 0
    return len(list(out.glob(".chunks-*/chunk-*.safetensors")))


class Trial:
    """One sample set, through kills, stops and restarts in other numbers of processes, to its end."""

    worlds = itertools.cycle(WORLDS)

    def __init__(self, root, name, model, count, save, rng, pace, tally):
        self.out, self.log, self.count, self.rng, self.tally = root / name, root / f"{name}.log", count, rng, tally
        self.arguments = command(model, self.out, count, "--save", *save)
        self.pace, self.chunks, self.made = pace, -(-count // CHUNK), []

    def run(self, kills):
        """Kills that hit a living worker; the set is left complete."""
        hits = 0
        while hits < kills and stored(self.out) is not None:
            hits += self.attempt(next(self.worlds))
        # Once more in any case: who was killed between the outputs and the end has left chunks to clear away.
        with self.workers(self.rng.choice(WORLDS)) as team:
            self.tally["unexpected"] += [code for worker in team if (code := worker.end())]
        assert stored(self.out) is None
        return hits

    def attempt(self, world):
        self.tally["worlds"][str(world)] += 1
        late = self.rng.random() < 0.3
        with self.workers(world) as team:
            if late:  # so that some die while the outputs are written
                while (done := stored(self.out)) is not None and done < self.chunks and any(w.running() for w in team):
                    time.sleep(0.001)
                time.sleep(self.rng.uniform(0, 0.05))
            else:
                time.sleep(self.rng.uniform(0, self.pace))
            before = stored(self.out)
            victims = self.rng.sample(team, self.rng.randint(1, world))
            hits = sum(worker.running() and worker.end(signal.SIGKILL) == -signal.SIGKILL for worker in victims)
            self.tally["while finishing"] += hits * (before == self.chunks)
            time.sleep(self.rng.uniform(0, self.pace / 4))  # the others go on meanwhile, and take over
            for worker in team:
                code = worker.end(signal.SIGTERM) if worker.running() else worker.code
                if code not in (0, STOPPED, -signal.SIGKILL, -signal.SIGTERM):  # SIGTERM before it was listened to
                    self.tally["unexpected"].append(code)
                self.tally["stopped"] += code == STOPPED
        return hits

    @contextlib.contextmanager
    def workers(self, world):
        reader, writer = os.pipe()
        team = [Worker(self.arguments, rank, world, self.log, writer) for rank in range(world)]
        os.close(writer)
        try:
            yield team
        finally:
            for worker in team:
                worker.end(signal.SIGKILL) if worker.running() else None
            data = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
            os.close(reader)
            self.made += [index for (index,) in struct.iter_unpack("q", data)]


def rows(path):
    return [image.tobytes() for image in np.load(path)["arr_0"]]


def compare(out, reference, tally):
    mine, right = rows(out / "samples.npz"), rows(reference / "samples.npz")
    tally["lost"] += len(set(right) - set(mine))
    tally["duplicated"] += len(mine) - len(set(mine))
    tally["corrupt"] += len(set(mine) - set(right))
    tally["npz identical"] += (out / "samples.npz").read_bytes() == (reference / "samples.npz").read_bytes()
    names = lambda folder: {p.name: file_record(p) for p in folder.iterdir()}  # noqa: E731
    tally["folder identical"] += names(out) == names(reference)


def run_all(root, kills):
    rng = random.Random(1)
    model = write_tiny_model(root / "model")
    # A kill loses nothing that the kernel was given; what a power cut loses, test_chunks.py asks.
    filesystem._LocalWriter.sync = lambda writer: None
    filesystem.LocalFileSystem.sync_folder = lambda fs, path: None
    quiet = contextlib.redirect_stderr(open(os.devnull, "w"))  # noqa: SIM115
    fresh = lambda: {  # noqa: E731
        "kills": 0, "trials": 0, "lost": 0, "duplicated": 0, "corrupt": 0, "npz identical": 0, "folder identical": 0,
        "made twice": 0, "while finishing": 0, "stopped": 0, "unexpected": [], "worlds": dict.fromkeys("123", 0),
    }  # fmt: skip
    found = {}
    for name, count, save, share in (("npz", COUNT, ["npz"], 0.8), ("both", 250, ["png", "npz"], 0.2)):
        reference, tally = root / f"reference-{name}", fresh()
        with quiet, contextlib.redirect_stdout(open(os.devnull, "w")):
            assert main(command(model, root / f"warm-{name}", 1)) == 0
            started = time.monotonic()
            assert main(command(model, reference, count, "--save", *save)) == 0
        seconds = time.monotonic() - started
        wanted = round(kills * share)
        while tally["kills"] < wanted:
            trial = Trial(root, f"{name}-{tally['trials']}", model, count, save, rng, seconds / 2, tally)
            tally["kills"] += trial.run(min(10, wanted - tally["kills"]))
            tally["trials"] += 1
            tally["made twice"] += len(trial.made) - len(set(trial.made))
            compare(trial.out, reference, tally)
        found[name] = tally | {
            "seconds of one run": round(seconds, 3),
            "distinct": len(set(rows(reference / "samples.npz"))),
        }
    return found


def orphan(folder, pipe):
    store = ChunkStore(folder, 1, "a")
    store.open()
    claim = store.claim(0)
    ready, told = os.pipe()
    if os.fork() == 0:
        os.write(told, b"1")  # it runs, and so has let go of what it inherited
        signal.pause()
    os.read(ready, 1)
    os.write(pipe, b"1" if claim else b"0")
    signal.pause()


def orphans(folder):
    """A killed holder frees its claim at once, even if a child of it lives on."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgrp()
            orphan(folder, writer)
        finally:
            os._exit(1)
    os.close(writer)
    store = ChunkStore(folder, 1, "a")
    held = os.read(reader, 1) == b"1" and store.claim(0) is None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    freed = store.claim(0) is not None
    os.killpg(pid, signal.SIGKILL)
    return {"held": held, "freed": freed}


if __name__ == "__main__":
    begin()
    place = Path(sys.argv[1])
    print(json.dumps(run_all(place, int(sys.argv[2])) | {"orphans": orphans(place / "orphans")}))
