"""Run by test_sharded_processes.py in a process of its own, because it forks: real processes save together over gloo.

Prints one JSON object. The parent imports torch once and forks for every process of every world.
"""

import json
import os
import random
import signal
import struct
import sys
import time
from datetime import timedelta
from pathlib import Path

import processes
import torch
import torch.distributed as dist

from smalti.checkpoints import AsyncSaver, CheckpointStore, Piece
from smalti.errors import SmaltiError, StorageError
from smalti.storage.filesystem import LocalFileSystem
from smalti.world import World

ROWS = 48


def payload(world, value):
    mine = world.share(ROWS, 1)
    group = {f"w{i}": Piece(torch.full((len(mine), 32), float(value)), (ROWS, 32), mine.start) for i in range(3)}
    return {"model": group, "ema": group, "optimizer": group | {"count": torch.tensor(float(value))}}


def start(size, meeting, function, *args):
    """Fork the processes of a world, each of which calls `function(world, *args)`; their ids."""
    meeting.unlink(missing_ok=True)
    pids, parent = [], os.getpid()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                processes.end_with_parent(parent)
                dist.init_process_group(
                    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
                )
                function(World(rank, size), *args)
                code = 0
            except SmaltiError:
                code = 3
            except BaseException as error:  # noqa: BLE001  (a child that lived on would run its parent's code)
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def ends(pids, seconds=processes.PATIENCE):
    """Exit codes, or None for a process that did not end in time (and is ended then)."""
    codes, deadline = [], time.monotonic() + seconds
    for pid in pids:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes.append(os.waitstatus_to_exitcode(status))
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes.append(None)
                break
            time.sleep(0.002)
    return codes


def write_for_ever(world, folder, begin, beside, pipe):
    """Save step after step, and tell of each through the pipe when it is stored for sure."""
    store = CheckpointStore(folder, keep_last=2, world=world)
    step = begin
    if not beside:
        os.write(pipe, struct.pack("d", 0))
        while True:
            step += 1
            store.save(step, payload(world, step), {"value": step})
            if world.rank == 0:
                os.write(pipe, struct.pack("d", step))
    with AsyncSaver(store) as saver:
        os.write(pipe, struct.pack("d", 0))
        while True:
            step += 1
            groups = payload(world, step)
            saver.save(step, groups, {"value": step})
            for members in groups.values():  # training goes on, and changes what was given
                for value in members.values():
                    (value.rows if isinstance(value, Piece) else value).fill_(-1)
            dist.all_reduce(torch.ones(1))
            if world.rank == 0 and step > begin + 1:
                os.write(pipe, struct.pack("d", step - 1))


def kill_writers(root, kills, rng):
    result = dict.fromkeys(("kills", "unreadable", "torn", "lost", "hung", "saves", "leftovers", "odd"), 0)
    result["kills"] = kills
    folder, acknowledged, newest = root / "store", 0.0, 0
    for kill in range(kills):
        size, beside = 2 + kill % 2, kill % 4 >= 2
        reader, pipe = os.pipe()
        pids = start(size, root / "meeting", write_for_ever, folder, newest, beside, pipe)
        os.close(pipe)
        # Before they have met, who is killed leaves the others waiting for as long as torch was told to wait.
        data, wanted = b"", 8 * (size + (kill % 3 > 0))
        while len(data) < wanted and (more := os.read(reader, wanted - len(data))):
            data += more
        time.sleep(rng.uniform(0, 0.1))
        victim = rng.randrange(size)
        os.kill(pids[victim], signal.SIGKILL)
        codes = ends(pids)
        result["hung"] += codes.count(None)
        result["odd"] += len([c for c in codes[:victim] + codes[victim + 1 :] if c not in (1, 3, None)])
        data += b"".join(iter(lambda fd=reader: os.read(fd, 1 << 16), b""))
        os.close(reader)
        values = [v for (v,) in struct.iter_unpack("d", data) if v]
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


class FullFileSystem(LocalFileSystem):
    """Has room for the folder and not for what is in it."""

    def create(self, path):
        raise OSError(28, os.strerror(28))


def together(world, folder, say):
    """What only real processes show: the same for sync and async saves, resharding, and one full disk."""
    store = CheckpointStore(folder, keep_last=2, world=world)
    store.save(1, payload(world, 1), {"value": 1})
    with AsyncSaver(store) as saver:
        for step in (2, 3, 4):
            saver.save(step, payload(world, step), {"value": step})
            for _ in range(20):  # the training's own messages, meanwhile
                ones = torch.ones(3)
                dist.all_reduce(ones)
                assert ones.tolist() == [world.size] * 3
        saver.wait()
    found = store.load_newest(lambda line: sys.exit(line))
    mine = world.share(ROWS, 1)
    rows = found.rows("model", "w0", mine.start, mine.stop)
    assert found.step == 4
    assert rows.shape == (len(mine), 32)
    assert bool((rows == 4).all())
    faulty = FullFileSystem() if world.rank == world.size - 1 else None
    full = CheckpointStore(folder, world=world, fs=faulty)
    message = ""
    try:
        full.save(5, payload(world, 5), {"value": 5})
    except StorageError as error:
        message = str(error)
    assert "No space left" in message, message
    beside = AsyncSaver(full)
    beside.save(5, payload(world, 5), {"value": 5})
    try:
        beside.wait()
    except StorageError as error:
        message = str(error)
    else:
        raise AssertionError("the saver has not told")
    assert store.load_newest(lambda line: sys.exit(line)).step == 4
    if world.rank == 0:
        os.write(say, b"1")


if __name__ == "__main__":
    processes.begin()
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    (root / "store").mkdir()
    reader, writer = os.pipe()
    worlds = [ends(start(size, root / "meeting", together, root / "together", writer)) for size in (2, 1, 3, 4, 2)]
    os.close(writer)
    told = len(os.read(reader, 99))
    print(json.dumps({"worlds": worlds, "told": told, "killed": kill_writers(root, kills, random.Random(1))}))
