"""Run by test_ends.py in a process of its own, because it forks: the end comes while something else is going on.

Arguments: an empty folder and how often. Prints one JSON object. Checkpoints are stored beside the training, onto a
disk that takes long, and steps go on meanwhile: the end comes once a step was finished during a save, or inside of a
validation or a picture.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from processes import begin, wait_until
from stop_loop import Child, has_a_checkpoint, newest_step, same
from tiny_runs import flags, write_set

import smalti.workflows.train as workflow
from smalti.checkpoints import CheckpointStore
from smalti.training.status import read_status

STEPS = 20  # for an attempt of either kind, which takes about four
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOOKS = ("validation_of", "save_preview")


def slow_disk():
    real = os.fsync

    def fsync(descriptor):
        time.sleep(0.02)
        real(descriptor)

    os.fsync = fsync


def met_a_save(child, out):
    """Until a checkpoint is being written beside the training; False if the run ended before."""
    while child.wait_for_steps(1):
        deadline = time.monotonic() + 0.05
        while time.monotonic() < deadline:
            if has_a_checkpoint(out, ".tmp-0"):
                return True
            time.sleep(0.002)
    return False


def whole_and_newest(out):
    """The step of the newest checkpoint, which must be whole."""
    found = CheckpointStore(out / "checkpoints").load_newest(on_skip=sys.exit)
    return 0 if found is None else found.step


def killed_during_saves(root, arguments, count):
    out, log = root / "killed", root / "killed.txt"
    result = dict.fromkeys(["during a save", "killed", "open", "kept"], 0)
    for _ in range(count):
        child = Child(arguments(out), log, slow_disk)
        result["during a save"] += met_a_save(child, out)
        before = newest_step(out)
        result["killed"] += child.end(signal.SIGKILL) == -signal.SIGKILL
        result["open"] += read_status(out).kind == "open"
        result["kept"] += whole_and_newest(out) >= before
    return result | {"code": Child(arguments(out), log).end(), "end": read_status(out).kind} | same(out, root / "whole")


def stopped(root, arguments, count):
    """Half during a save beside the training, half inside of a look at the run."""
    out, log = root / "stopped", root / "stopped.txt"
    result = dict.fromkeys(["met", "exit 75", "saved at the last step", "marked"], 0)
    for k in range(count):
        number, inside = SIGNALS[k % 3], root / f"inside-{k}"

        def linger(inside=inside, look=LOOKS[k // 2 % 2]):
            real = getattr(workflow, look)

            def slow(*given):
                inside.write_text("")
                time.sleep(0.3)
                return real(*given)

            setattr(workflow, look, slow)

        if k % 2:
            child = Child(arguments(out), log, slow_disk)
            result["met"] += met_a_save(child, out)
        else:
            child = Child(arguments(out), log, linger)
            wait_until(inside.exists, "a look", [child.pid])
            result["met"] += 1
        result["exit 75"] += child.end(number) == 75
        step, status = child.steps[-1], read_status(out)
        result["saved at the last step"] += whole_and_newest(out) == step
        said = (status.kind, status.values.get("step"), status.values.get("signal"))
        result["marked"] += said == ("preempted", str(step), number.name)
    return result | {"code": Child(arguments(out), log).end(), "end": read_status(out).kind} | same(out, root / "whole")


if __name__ == "__main__":
    begin("smalti.cli.train", "torch._dynamo")
    root, count = Path(sys.argv[1]), int(sys.argv[2])
    data, more = write_set(root / "data"), ["--steps", str(STEPS * count // 2), "--sample-every", "3"]
    assert Child(flags(root / "whole", data, *more), root / "whole.txt").end() == 0, (root / "whole.txt").read_text()
    parts = {"killed": killed_during_saves, "stopped": stopped}
    print(json.dumps({name: part(root, lambda out: flags(out, data, *more), count) for name, part in parts.items()}))
