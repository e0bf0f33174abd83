"""A file system that fails or forgets on purpose, and small checkpoints to store on it."""

import contextlib
import copy
import itertools
import json
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smalti.checkpoints import LocalFileSystem, Piece
from smalti.storage import process
from smalti.world import World


class Crash(BaseException):
    """The process is gone: nothing after it runs."""


class _File:
    def __init__(self):
        self.data, self.synced = bytearray(), b""


class _Folder:
    def __init__(self):
        self.names, self.synced, self.log = {}, {}, []

    def change(self, names):
        self.names = names
        self.log.append(dict(names))


class FaultyFileSystem:
    """Real files, and beside them a model of what the disk would hold if the power went now.

    `fault(call, name)` runs before each operation and may raise. A file's bytes are durable once it was synced, a
    folder's names once the folder was; the order of name changes inside one folder is kept, as a journal does.
    """

    def __init__(self, root):
        self.root, self.calls, self.names = Path(root), 0, []
        self.fault = lambda call, name: None
        self.free = 10**9
        self.disk = _Folder()
        self.lock = threading.RLock()

    def view(self):
        """The same disk for another process, with calls and faults of its own."""
        other = copy.copy(self)
        other.calls, other.names, other.fault = 0, [], lambda call, name: None
        return other

    def step(self, name):
        self.calls += 1
        self.names.append(name)
        self.fault(self.calls, name)

    def folder(self, path):
        node = self.disk
        for part in Path(path).relative_to(self.root).parts:
            node = node.names[part]
        return node

    def make_folder(self, path):
        self.step("make_folder")
        path.mkdir()
        with self.lock:
            parent = self.folder(path.parent)
            parent.change(parent.names | {path.name: _Folder()})

    def create(self, path):
        self.step("create")
        assert not path.exists()
        with self.lock:
            node, parent = _File(), self.folder(path.parent)
            parent.change(parent.names | {path.name: node})
        return _FaultyWriter(self, path, node)

    def rename(self, source, target):
        self.step("rename")
        os.rename(source, target)
        assert source.parent == target.parent
        parent = self.folder(source.parent)
        names = dict(parent.names)
        names[target.name] = names.pop(source.name)
        parent.change(names)

    def sync_folder(self, path):
        self.step("sync_folder")
        if path == self.root.parent:
            return
        node = self.folder(path)
        node.synced, node.log = dict(node.names), []

    def remove_file(self, path):
        self.step("remove_file")
        path.unlink()
        parent = self.folder(path.parent)
        parent.change({name: node for name, node in parent.names.items() if name != path.name})

    def remove_folder(self, path):
        self.step("remove_folder")
        path.rmdir()
        parent = self.folder(path.parent)
        parent.change({name: node for name, node in parent.names.items() if name != path.name})

    def free_bytes(self, path):
        self.step("free_bytes")
        return self.free

    def after_power_cut(self, target, mode, seed=0):
        """Lay out what the disk holds: `lost` = only what was synced, `names` = names but no unsynced bytes, `mixed` =
        some of either, `unordered` = any of the name changes that were not synced, as where there is no journal."""
        self._lay(self.disk, Path(target), mode, random.Random(seed))
        return Path(target)

    def _lay(self, node, path, mode, rng):
        path.mkdir(parents=True, exist_ok=True)
        names = {"lost": node.synced, "names": node.names}.get(mode)
        if mode == "unordered":
            names = dict(node.synced)
            for before, after in itertools.pairwise([node.synced, *node.log]):
                if rng.random() < 0.5:
                    names = {n: child for n, child in names.items() if n in after or n not in before}
                    names |= {n: child for n, child in after.items() if before.get(n) is not child}
        if names is None:
            names = rng.choice([node.synced, *node.log])
        for name, child in names.items():
            if isinstance(child, _Folder):
                self._lay(child, path / name, mode, rng)
            else:
                keep = rng.randint(len(child.synced), len(child.data)) if mode == "mixed" else len(child.synced)
                (path / name).write_bytes(bytes(child.data[:keep]))


class _FaultyWriter:
    def __init__(self, fs, path, node):
        self.fs, self.node = fs, node
        self.file = path.open("xb", buffering=0)

    def write(self, data):
        try:
            self.fs.step("write")
        except BaseException:
            self._put(bytes(data)[: len(data) // 2])
            raise
        self._put(bytes(data))

    def _put(self, data):
        self.file.write(data)
        self.node.data += data

    def sync(self):
        self.fs.step("sync")
        self.node.synced = bytes(self.node.data)

    def close(self):
        self.file.close()
        self.fs.step("close")


class Hub:
    """Where the threads of one test meet, each of which plays a process."""

    def __init__(self, size):
        self.barrier, self.slots = threading.Barrier(size, timeout=120), [b""] * size

    def exchange(self, rank, data):
        self.slots[rank] = data
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class ThreadWorld(World):
    """A world of threads: hundreds of crashes cost seconds. What is said over gloo, test_sharded_processes.py shows."""

    hub: Hub | None = None

    def _exchange(self, data, group, *, everywhere):
        with self._together():
            parts = self.hub.exchange(self.rank, data)
        return parts if everywhere or self.rank == 0 else None

    def broadcast_object(self, value, group=None):
        with self._together():
            return json.loads(self.hub.exchange(self.rank, json.dumps(value).encode() if self.rank == 0 else b"")[0])


def in_ranks(size, function):
    """Call `function(world)` as so many processes would; what each returned or raised, in order of rank."""
    if size == 1:
        return [_outcome(function, World(), None)]
    hub, results = Hub(size), [None] * size

    def run(rank):
        results[rank] = _outcome(function, ThreadWorld(rank, size, hub=hub), hub)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _outcome(function, world, hub):
    try:
        return function(world)
    except Exception as error:  # noqa: BLE001  (the tests look at it)
        return error
    except BaseException as error:  # noqa: BLE001  (the process is gone: who waits for it learns that)
        if hub is not None:
            hub.barrier.abort()
        return error


def parts(world, value, rows=7):
    """What a process of `world` gives of three groups in which every element is `value`: rows, and whole tensors."""
    mine = world.share(rows, 1)
    cut = lambda *shape: Piece(torch.full((len(mine), *shape), float(value)), (rows, *shape), mine.start)  # noqa: E731
    group = lambda: {"a.weight": cut(5), "a.bias": cut()}  # noqa: E731
    whole = {"count": torch.tensor(int(value))} if world.rank == 0 else {"count": torch.tensor(-1)}
    return {"model": group(), "ema": group(), "optimizer": group() | whole}


class QuickFileSystem:
    """The real one without its syncs, which cost most of the time where no power cut is meant."""

    def __init__(self):
        self.real = LocalFileSystem()
        for name in ("make_folder", "rename", "remove_file", "remove_folder", "free_bytes"):
            setattr(self, name, getattr(self.real, name))

    def create(self, path):
        writer = self.real.create(path)
        return SimpleNamespace(write=writer.write, sync=lambda: None, close=writer.close)

    def sync_folder(self, path):
        assert path.is_dir()


def crash_at(k):
    """From call k on the process is dead: it can do nothing more."""

    def fault(call, name):
        if call >= k:
            raise Crash

    return fault


def fail_at(k, number, *, lasting):
    """Call k fails with this errno; if lasting, whatever needs space later fails too."""

    def fault(call, name):
        needs_space = name in ("create", "write", "sync", "close", "make_folder")
        if call == k or (lasting and call > k and needs_space):
            raise OSError(number, os.strerror(number))

    return fault


def payload(value):
    """Three groups in which every element is `value`."""
    group = lambda: {"a.weight": torch.full((3, 5), float(value)), "a.bias": torch.full((5,), float(value))}  # noqa: E731
    return {"model": group(), "ema": group(), "optimizer": group() | {"count": torch.tensor(int(value))}}


def value_of(checkpoint):
    """The one value of a checkpoint; an AssertionError if it was put together from several."""
    values = {float(v) for group in checkpoint.tensors.values() for t in group.values() for v in t.flatten()}
    values.add(float(checkpoint.state["value"]))
    assert len(values) == 1, f"torn: {values}"
    assert sorted(checkpoint.tensors) == ["ema", "model", "optimizer"]
    return values.pop()


@contextlib.contextmanager
def dying_process(monkeypatch, *, host="", boot=""):
    """Everything inside is done by a process that has ended when the block is left."""
    me = process.Process.current()
    dead = process.Process(2**31 - 1, host or me.host, boot or me.boot_id, 1)
    with monkeypatch.context() as patch:
        patch.setattr(process.Process, "current", classmethod(lambda cls: dead))
        yield


@pytest.fixture
def faults(monkeypatch):
    return SimpleNamespace(
        FileSystem=FaultyFileSystem,
        QuickFileSystem=QuickFileSystem,
        Crash=Crash,
        crash_at=crash_at,
        fail_at=fail_at,
        payload=payload,
        parts=parts,
        in_ranks=in_ranks,
        value_of=value_of,
        dying_process=lambda **kw: dying_process(monkeypatch, **kw),
    )
