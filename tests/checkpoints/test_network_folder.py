"""A folder on a network: names appear late, handles go stale, requests are sent twice. Nothing stored is lost."""

import errno
import os
import queue
import random
import threading
import time
from pathlib import Path

import pytest

from smalti.checkpoints import CheckpointStore, patience
from smalti.errors import StorageError

_WRITES = ("make_folder", "create", "rename", "sync_folder", "remove_file", "remove_folder", "free_bytes")


class Late:
    """The server: it knows at once what was renamed, and the client's view follows some milliseconds later."""

    def __init__(self, rng):
        self.rng, self.queue, self.known, self.lock = rng, queue.Queue(), {}, threading.Lock()
        self.odd = []
        threading.Thread(target=self._run, daemon=True).start()

    def exists(self, path):
        return self.known[path][0] if path in self.known else path.exists()

    def require(self, path):
        """What the client still sees may be elsewhere by now, and so what is in it."""
        if not all(self.exists(p) for p in (path, path.parent)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    def rename(self, source, target):
        with self.lock:
            if not self.exists(source):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
            if self.exists(target) and target.name.startswith("step-"):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
            mark = object()
            self.known[source], self.known[target] = (False, mark), (True, mark)
        self.queue.put((source, target, mark, self.rng.uniform(0, 0.004)))

    def _run(self):
        while (job := self.queue.get()) is not None:
            source, target, mark, pause = job
            time.sleep(pause)
            try:
                os.rename(source, target)
            except OSError as error:
                self.odd.append(error)
            with self.lock:
                for path in (source, target):
                    if self.known[path][1] is mark:
                        del self.known[path]
            self.queue.task_done()
        self.queue.task_done()


class NetworkFileSystem:
    """One client of it. Now and then an operation answers ESTALE; it is done, or not, before that."""

    def __init__(self, quick, late, rng, *, first):
        self.quick, self.late, self.rng, self.first = quick, late, rng, first
        self.seen = set()

    def __getattr__(self, name):
        assert name in _WRITES
        return lambda *paths: self._ask(name, *paths)

    def _ask(self, name, *paths):
        if self.rng.random() < 0.05:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if name == "create" and not self.first and paths[0].parent not in self.seen:
            self.seen.add(paths[0].parent)  # the folder is another machine's, and not to be seen at once
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(paths[0]))
        if name == "rename":
            if self.rng.random() < 0.1 and paths[0].is_dir():
                self.late.rename(*paths)
                self.late.queue.join()
                os.rename(*paths)  # sent once more: there is no such source now
            return self.late.rename(*paths)
        if name.startswith("remove"):
            self.late.require(paths[0])
        result = getattr(self.quick, name)(*paths)
        if name == "make_folder" and self.rng.random() < 0.3:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(paths[0]))
        return result


@pytest.fixture
def stale_reads(monkeypatch):
    """Now and then the first look at a file or folder answers ESTALE."""
    rng, read, listdir = random.Random(0), Path.read_bytes, os.listdir

    def sometimes(real):
        def act(*args):
            if rng.random() < 0.05:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(*args)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", sometimes(read))
        patch.setattr(os, "listdir", sometimes(listdir))
        yield


def never(message):
    raise AssertionError(f"skipped: {message}")


@pytest.mark.faults
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.usefixtures("stale_reads")
def test_in_fifty_trials_nothing_is_lost(tmp_path, faults, size):
    for trial in range(50):
        rng = random.Random(1000 * size + trial)
        late, folder = Late(rng), tmp_path / str(trial)

        def run(world, rng=rng, late=late, folder=folder):
            fs = NetworkFileSystem(faults.QuickFileSystem(), late, random.Random(rng.random()), first=world.rank == 0)
            store = CheckpointStore(folder, keep_last=1, fs=fs, world=world)
            for value in (1, 2, 3):
                store.save((1, 2, 2)[value - 1], faults.parts(world, value), {"value": value})
            found = store.load_newest(lambda line: None)  # what shows by now
            return None if found is None else found.path.name

        names = faults.in_ranks(size, run)
        assert names == names[:1] * size, names
        if isinstance(names[0], BaseException):
            raise names[0]
        late.queue.join()
        assert late.odd == []
        assert faults.value_of(CheckpointStore(folder).load_newest(never)) == 3, trial
        late.queue.put(None)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EEXIST], ids=["ESTALE", "EEXIST"])
def test_what_lasts_is_told_in_one_line(tmp_path, faults, monkeypatch, number):
    monkeypatch.setattr(patience, "PAUSES", (0.001, 0.001))
    CheckpointStore(tmp_path).save(1, faults.payload(1), {"value": 1})

    class Stuck(faults.QuickFileSystem):
        def __init__(self):
            super().__init__()
            self.asked = 0
            self.make_folder = self.refuse

        def refuse(self, path):
            self.asked += 1
            if number == errno.EEXIST:  # of somebody else, with something in it
                path.mkdir(exist_ok=True)
                (path / "theirs").touch()
            raise OSError(number, os.strerror(number), str(path))

    fs = Stuck()
    with pytest.raises(StorageError, match=os.strerror(number)) as error:
        CheckpointStore(tmp_path, fs=fs).save(2, faults.payload(2), {"value": 2})
    assert "\n" not in str(error.value)
    assert fs.asked == (3 if number == errno.ESTALE else 1)
    assert faults.value_of(CheckpointStore(tmp_path).load_newest(never)) == 1
