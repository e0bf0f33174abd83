"""Run by test_stopping.py in a process of its own, because it forks: kill and stop small runs at random moments.

Arguments: a folder, what to do (one of PARTS) and how often. Prints one JSON object. The parent imports torch once and
forks per attempt; every child runs the real command in process and reports each finished step through a pipe. Only
`command` kills a new Python each time.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from processes import begin, end_with_parent, wait_until
from tiny_runs import flags, write_set

import smalti.workflows.train as workflow
import smalti.workflows.train_looks as looks
from smalti.checkpoints import CheckpointStore
from smalti.cli import main
from smalti.training.log import read_log

INTERRUPTED, STOPPED = 130, 75
KILLS, STEPS = 10, 60  # of each run that is killed


class Child:
    """One attempt: `smalti train` in a fork, with a pipe that tells of every finished step.

    `after(step, count)` is called in the fork when a step was told of, the `count`-th of this attempt.
    """

    def __init__(self, arguments, log, prepare=lambda: None, after=lambda step, count: None):
        self.reader, writer = os.pipe()
        self.steps, parent = [], os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                end_with_parent(parent)
                os.close(self.reader)
                code = self._train(arguments, log, writer, prepare, after)
            except BaseException:  # noqa: BLE001  (a fork must not return to the parent's code)
                with log.open("a") as out:
                    traceback.print_exc(file=out)
            finally:
                os._exit(code)
        os.close(writer)

    def _train(self, arguments, log, writer, prepare, after):
        real = workflow.train_steps

        def told(*args, **kwargs):
            for count, report in enumerate(real(*args, **kwargs), 1):
                os.write(writer, struct.pack("q", report.step))
                after(report.step, count)
                yield report

        workflow.train_steps = told
        workflow.tensorboard_installed = lambda: False  # an import of seconds; the real command below has it
        prepare()
        with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return main(arguments)

    def wait_for_steps(self, count):
        """Until `count` more steps are finished; False if the child ended before."""
        for _ in range(count):
            data = os.read(self.reader, 8)
            if len(data) < 8:
                return False
            self.steps += struct.unpack("q", data)
        return True

    def end(self, number=None):
        """Send a signal if one is given, then the exit code (negative: killed by that signal)."""
        if number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        data = b"".join(iter(lambda: os.read(self.reader, 1 << 16), b""))
        self.steps += [step for (step,) in struct.iter_unpack("q", data)]
        os.close(self.reader)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def state_of(out):
    """Digest of every bit that a finished run consists of: weights, average, optimizer, counters, model."""
    newest = CheckpointStore(out / "checkpoints").load_newest(on_skip=sys.exit)
    digests = {
        f"{group}.{name}": hashlib.sha256(
            f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bytes_of(tensor)
        ).hexdigest()
        for group, members in newest.tensors.items()
        for name, tensor in members.items()
    }
    finished = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
    return {"tensors": digests, "step": newest.step, "counters": newest.state, "finished": finished}


def bytes_of(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def log_of(out):
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_log(out)]


def log_is_in_order(out):
    """Every line whole JSON, and steps strictly rising within each kind of event."""
    path = out / "log.jsonl"
    if not path.exists():
        return True
    last = {}
    for line in read_log(out):
        if line["step"] <= last.get(line["event"], -1):
            return False
        last[line["event"]] = line["step"]
    return True


def same(out, whole):
    here, there = state_of(out), state_of(whole)
    assert len(here["tensors"]) > 50
    return {"state": here == there, "log": log_of(out) == log_of(whole)}


def newest_step(out):
    """0 if there is none. The run may be deleting an older one that is just being looked at; that is no fault."""
    stored = CheckpointStore(out / "checkpoints").load_newest(on_skip=lambda reason: None)
    return stored.step if stored is not None else 0


def kill_often(root, data, runs):
    """Each run is killed `KILLS` times before it may end. It waits for a kill that is late."""
    log, pace, rng = root / "killed.txt", {}, random.Random(2)
    whole = run_whole(root / "whole", data, STEPS, pace)
    result = dict.fromkeys(
        ["kills", "attempts", "log in order", "before the first step", "went back", "ends", "same state", "same log"], 0
    )
    for run in range(runs):
        out = root / f"killed-{run}"
        arguments = flags(out, data, "--steps", str(STEPS))
        for _ in range(KILLS):
            early, wanted = rng.random() < 0.2, rng.randint(1, 4)

            def wait(step, count, wanted=wanted):
                while count == wanted + 2 or step == STEPS - 1:
                    time.sleep(1)

            child = Child(arguments, log, after=wait)
            if early:
                time.sleep(rng.uniform(0, pace["start"]))
            else:
                child.wait_for_steps(min(wanted, STEPS - 1 - newest_step(out)))
                time.sleep(rng.uniform(0, pace["step"] + pace["save"]))
            stored = newest_step(out)
            code = child.end(signal.SIGKILL)
            result["attempts"] += 1
            result["kills"] += code == -signal.SIGKILL
            result["before the first step"] += not child.steps
            result["log in order"] += log_is_in_order(out)
            result["went back"] += newest_step(out) < stored
        result["ends"] += Child(arguments, log).end() == 0
        seen = same(out, whole)
        result["same state"] += seen["state"]
        result["same log"] += seen["log"]
        shutil.rmtree(out)
    return result | {"passed over": log.read_text().count("passed over")}


def stop_often(root, data, stops):
    """SIGTERM, SIGINT and SIGUSR1 in turn; each time the very next step is the first of the next attempt.

    Every second one comes while a checkpoint is being written.
    """
    out, log, pace, rng = root / "stopped", root / "stopped.txt", {}, random.Random(3)
    steps = 8 * stops
    whole = run_whole(root / "whole", data, steps, pace)
    arguments = flags(out, data, "--steps", str(steps))
    result = dict.fromkeys(["stops", "exit 75", "saved at the last step", "lost", "repeated", "during a save"], 0)
    before = 0
    for k in range(stops):
        number, wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[k % 3], rng.randint(1, 4)
        stop = LateStop(root / f"stop-{k}", out, wanted, during_a_save=k % 2 == 1)
        child = Child(arguments, log, stop.prepare, stop.after)
        assert child.wait_for_steps(wanted), log.read_text()
        if k % 2:
            result["during a save"] += stop.met(child)
        else:
            time.sleep(rng.uniform(0, pace["step"] + pace["save"]))
        os.kill(child.pid, number)
        stop.sent.touch()
        code = child.end()
        result["stops"] += 1
        result["exit 75"] += code == STOPPED
        result["saved at the last step"] += newest_step(out) == child.steps[-1]
        result["lost"] += child.steps[0] > before + 1
        result["repeated"] += child.steps[0] <= before
        before = child.steps[-1]
    last = Child(arguments, log)
    result["code"] = last.end()
    result["lost"] += last.steps[0] > before + 1
    result["named"] = log.read_text().count("the same command continues")
    return result | same(out, whole)


class LateStop:
    """Makes an attempt wait for an end that is late: `wanted + 2` steps after its start, or inside of a save.

    A save is waited in until a step was finished beside it. The disk is slow on top, so that the save takes its time
    after the signal, too.
    """

    def __init__(self, folder, out, wanted, *, during_a_save):
        folder.mkdir()
        self.saving, self.sent = folder / "saving", folder / "sent"
        self.out, self.wanted, self.during_a_save = out, wanted, during_a_save
        self.step = self.count = self.stored = 0

    def after(self, step, count):
        self.step, self.count = step, count
        while count == self.wanted + 2 and not self.during_a_save and not self.sent.exists():
            time.sleep(0.002)

    def prepare(self):
        real, save = os.fsync, CheckpointStore.save

        def noted(store, step, *given, **named):
            self.stored = step
            return save(store, step, *given, **named)

        def fsync(descriptor):
            beside = threading.current_thread() is not threading.main_thread()
            if beside and self.count >= self.wanted and has_a_checkpoint(self.out, ".tmp-0"):
                while not self.sent.exists():
                    if self.step > self.stored:
                        self.saving.touch()
                    time.sleep(0.002)
            time.sleep(0.005)
            real(descriptor)

        if self.during_a_save:
            os.fsync, CheckpointStore.save = fsync, noted

    def met(self, child):
        """Wait until a step was finished beside a save, and say whether that is still going on."""
        wait_until(self.saving.exists, "a save", [child.pid])
        return has_a_checkpoint(self.out, ".tmp-0")


def has_a_checkpoint(out, prefix):
    """The folder itself is made with the first checkpoint, which a slow machine writes after the steps seen here."""
    with contextlib.suppress(FileNotFoundError):
        return any(name.startswith(prefix) for name in os.listdir(out / "checkpoints"))
    return False


def interrupt_twice(root, data, _):
    """The first Ctrl-C waits for the step's end, which never comes here; the second one does not wait."""
    out, log, inside = root / "interrupted", root / "interrupted.txt", root / "inside"

    def hang():
        def validate(*args, **kwargs):
            inside.write_text("")
            time.sleep(60)

        looks.validate = validate

    child = Child(flags(out, data, "--steps", "30"), log, hang)
    assert child.wait_for_steps(3), log.read_text()
    wait_until(inside.exists, "a validation", [child.pid])
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.3)
    still_there = os.waitpid(child.pid, os.WNOHANG) == (0, 0)
    started = time.monotonic()
    code = child.end(signal.SIGINT)
    seconds = time.monotonic() - started
    again = Child(flags(out, data, "--steps", "30"), log)
    return {
        "waits after the first": still_there,
        "code": code,
        "at once": seconds < 30,  # the step would take twice that
        "said": log.read_text().rstrip().endswith("smalti: interrupted"),
        "stored": newest_step(out),
        "continues": again.end(),
        "first step then": again.steps[0],
    }


def refuse_a_second(root, data, seconds):
    """One run stands still in the middle while others try the same folder, by the same command and by other ones."""
    out, log, refused, inside, go = (root / name for name in ("held", "held.txt", "refused.txt", "inside", "go"))
    whole = run_whole(root / "whole", data, STEPS)

    def wait():
        real = looks.validate

        def validate(*args, **kwargs):
            inside.touch()
            while not go.exists():
                time.sleep(0.01)
            return real(*args, **kwargs)

        looks.validate = validate

    first = Child(flags(out, data, "--steps", str(STEPS)), log, wait)
    wait_until(inside.exists, "a validation", [first.pid])
    wait_until((out / "checkpoints" / "LATEST").exists, "the last thing that is written", [first.pid])
    before = files_at_rest(out)
    result = {"refused": 0, "named": 0, "wrote": 0}
    for k in range(seconds):
        other = ["--seed", "1"] if k % 2 else []
        second = Child(flags(out, data, "--steps", str(STEPS), *other), refused)
        result["refused"] += second.end() == 73 and not second.steps
        result["wrote"] += files_of(out) != before
    result["named"] = refused.read_text().count(f"is being written by process {first.pid} on")
    go.write_text("")
    return result | {"code": first.end()} | same(out, whole)


def files_at_rest(folder):
    """The files, once nothing has been written in the background for a while."""
    before = None
    while before != (now := files_of(folder)):
        before = now
        time.sleep(0.2)
    return now


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_the_command(root, data, kills):
    """Through `python -m smalti train`, TensorBoard and all. Nothing makes it wait for a kill, so there is room."""
    out, steps = root / "command", 40 + 6 * kills
    arguments = [sys.executable, "-W", "ignore", "-m", "smalti", *flags(out, data, "--steps", str(steps))]
    log, codes, whole = (root / "command.txt").open("w"), [], run_whole(root / "whole", data, steps)
    for k in range(kills):
        aim = max(steps // 3 * (k + 1) // kills, newest_name(out) + 2)
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
        wait_until(lambda aim=aim: newest_name(out) >= aim, f"step {aim}", [process.pid])
        process.kill()
        codes.append(process.wait())
    done = subprocess.run(arguments, capture_output=True, text=True)
    return {"codes": codes, "code": done.returncode, "said": done.stderr + done.stdout} | same(out, whole)


def newest_name(out):
    """As `newest_step`, but by the names alone, which takes no time."""
    with contextlib.suppress(FileNotFoundError):
        return max((int(name[5:]) for name in os.listdir(out / "checkpoints") if name.startswith("step-")), default=0)
    return 0


def run_whole(out, data, steps, pace=None):
    """A run that nothing stops; how long its parts take, if asked."""
    started = time.monotonic()
    log = out.with_suffix(".txt")
    child = Child(flags(out, data, "--steps", str(steps)), log)
    child.wait_for_steps(1)
    start = time.monotonic() - started
    child.wait_for_steps(steps // 2)
    one = (time.monotonic() - started - start) / (steps // 2)
    assert child.end() == 0, log.read_text()
    if pace is not None:
        pace.update(start=start, step=one, save=2 * one)
    return out


PARTS = {
    "kill": kill_often,
    "stop": stop_often,
    "interrupt": interrupt_twice,
    "second": refuse_a_second,
    "command": kill_the_command,
}

if __name__ == "__main__":
    begin("smalti.cli.train", "torch._dynamo")  # what a run would import later
    root, part, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    print(json.dumps(PARTS[part](root, write_set(root / "data"), count)))
