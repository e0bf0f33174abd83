"""Run by test_ends.py in a process of its own, because it forks: the end comes while something else is going on.

Arguments: an empty folder and how often. Prints one JSON object. Checkpoints are stored beside the training, and steps
go on meanwhile: the end comes once a step was finished during a save, or inside of a validation or a picture. What it
comes in waits for it, so that it is met however busy the machine is.
"""

import json
import os
import signal
import sys
from pathlib import Path

from processes import begin, wait_until
from stop_loop import Child, LateStop, newest_step, same
from tiny_runs import flags, write_set

import smalti.workflows.train as workflow
from smalti.checkpoints import CheckpointStore
from smalti.training.status import read_status

STEPS = 12  # for two attempts, which take ten at most
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOOKS = ("validation_of", "save_preview")


def whole_and_newest(out):
    """The step of the newest checkpoint, which must be whole."""
    found = CheckpointStore(out / "checkpoints").load_newest(on_skip=sys.exit)
    return 0 if found is None else found.step


def killed_during_saves(root, arguments, count):
    out, log = root / "killed", root / "killed.txt"
    result = dict.fromkeys(["during a save", "killed", "open", "kept"], 0)
    for k in range(count):
        late = LateStop(root / f"kill-{k}", out, 3 + k % 3, during_a_save=True)
        child = Child(arguments(out), log, late.prepare, late.after)
        result["during a save"] += late.met(child)
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
        number = SIGNALS[k % 3]
        late = LateStop(root / f"stop-{k}", out, 1 + k % 4, during_a_save=k % 2 == 1)

        def linger(late=late, look=LOOKS[k // 2 % 2]):
            real = getattr(workflow, look)

            def slow(*given):
                late.saving.touch()
                wait_until(late.sent.exists, "the signal")
                return real(*given)

            setattr(workflow, look, slow)

        if k % 2:
            child = Child(arguments(out), log, late.prepare, late.after)
            result["met"] += late.met(child)
        else:
            child = Child(arguments(out), log, linger)
            wait_until(late.saving.exists, "a look", [child.pid])
            result["met"] += 1
        os.kill(child.pid, number)
        late.sent.touch()
        result["exit 75"] += child.end() == 75
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
