"""Run by test_kill.py in a process of its own, because it forks: kill a writer at random moments, look at what is left.

Prints one JSON object. The parent imports torch once and forks per kill, which makes a kill cost some hundredths of a
second.
"""

import json
import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import torch
from processes import begin, end_with_parent

from smalti.checkpoints import CheckpointStore, RunLock
from smalti.errors import RunLockedError


def payload(value):
    group = {f"w{i}": torch.full((64, 32), float(value)) for i in range(3)}
    return {"model": group, "ema": group, "optimizer": group}


def write_for_ever(folder, start, pipe):
    store = CheckpointStore(folder, keep_last=2)
    step = start
    while True:
        step += 1
        for value in (step, step + 0.5)[: 1 + step % 2]:  # every second step is stored twice
            store.save(step, payload(value), {"value": value})
            os.write(pipe, struct.pack("d", value))


def fork(function, *args, survives=False):
    """A process that calls a function, and then ends with code 1; with its parent unless it `survives`."""
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        try:
            if not survives:
                end_with_parent(parent)
            function(*args)
        except BaseException:  # noqa: BLE001  (a fork must not return to the parent's code)
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def kill_writers(folder, kills, rng):
    result = {"kills": kills, "unreadable": 0, "torn": 0, "lost": 0, "saves": 0, "leftovers": 0}
    acknowledged, newest = 0.0, 0
    started = time.monotonic()
    CheckpointStore(folder.with_name("measure")).save(1, payload(1), {"value": 1})
    one_save = time.monotonic() - started
    for kill in range(kills):
        reader, writer = os.pipe()
        pid = fork(write_for_ever, folder, newest, writer)
        os.close(writer)
        # Every second writer lives until its first save, however busy the machine; the others may not come that far.
        data = os.read(reader, 8) if kill % 2 else b""
        time.sleep(rng.uniform(0, 3) * one_save)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        data += b"".join(iter(lambda fd=reader: os.read(fd, 1 << 16), b""))
        os.close(reader)
        values = [v for (v,) in struct.iter_unpack("d", data)]
        result["saves"] += len(values)
        acknowledged = max([acknowledged, *values])
        skipped = []
        found = CheckpointStore(folder).load_newest(skipped.append)
        result["unreadable"] += len(skipped)
        if found is None:
            result["lost"] += acknowledged > 0
            continue
        seen = {float(v) for group in found.tensors.values() for t in group.values() for v in t.flatten()}
        result["torn"] += seen != {found.state["value"]}
        result["lost"] += found.state["value"] < acknowledged
        newest = found.step
    CheckpointStore(folder).sweep()
    result["leftovers"] = len([p for p in folder.iterdir() if p.name.startswith(".")])
    return result


def hold(folder, pipe, with_child):
    os.setpgrp()
    lock = RunLock(folder)
    lock.__enter__()
    if with_child:
        fork(signal.pause, survives=True)
    os.write(pipe, b"1")
    signal.pause()


def contend(folder, rounds):
    """A held lock refuses a second process, a killed holder frees it, also when its child lives on, and of two that
    come at once one gets it."""
    result = {"rounds": rounds, "refused": 0, "named": 0, "freed": 0, "one of two": 0}
    for i in range(rounds):
        reader, writer = os.pipe()
        pid = fork(hold, folder, writer, i % 2 == 1)
        os.close(writer)
        assert os.read(reader, 1), "the first holder has failed"
        try:
            with RunLock(folder):
                pass
        except RunLockedError as error:
            result["refused"] += 1
            result["named"] += f"process {pid} on" in str(error)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:
            with RunLock(folder):
                result["freed"] += 1
        except RunLockedError:
            pass
        if i % 2 == 1:
            os.killpg(pid, signal.SIGKILL)
        os.close(reader)
        result["one of two"] += sorted(race(folder)) == [0, 73]
    return result


def race(folder):
    """Exit codes of two processes that want the folder at the same moment."""
    start, go = os.pipe()
    done, tell = os.pipe()
    pids = [fork(run_once, folder, start, done) for _ in range(2)]
    os.close(start), os.close(done)
    os.write(go, b"11")
    first, code = os.wait()
    codes = [os.waitstatus_to_exitcode(code)]  # the refused one: the other holds on until it is told
    os.write(tell, b"1")
    (second,) = set(pids) - {first}
    codes.append(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
    os.close(go), os.close(tell)
    return codes


def run_once(folder, start, done):
    signal.alarm(60)  # should both be let in, so that nobody is told
    os.read(start, 1)
    try:
        with RunLock(folder):
            os.read(done, 1)
    except RunLockedError as error:
        os._exit(error.exit_code)
    os._exit(0)


if __name__ == "__main__":
    begin()
    root, part, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    folder = root / part
    folder.mkdir()
    print(json.dumps(contend(folder, count) if part == "lock" else kill_writers(folder, count, random.Random(1))))
