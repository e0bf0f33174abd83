"""A real file system whose power goes: ext4 on a loop device, shut down by the kernel without writing its journal.

Needs root and a loop device. Where those are not to be had, the model of a disk in tests/checkpoints says the same.
"""

import errno
import gc
import os
import random
import shutil
from pathlib import Path

import disks
import pytest
import torch

from smalti.checkpoints import CheckpointStore
from smalti.errors import StorageError
from smalti.report.files import write_text
from smalti.storage.filesystem import LocalFileSystem
from smalti.training.config import GuardConfig
from smalti.training.guard import Guard
from smalti.training.log import RunLog
from smalti.training.status import mark_preempted

pytestmark = pytest.mark.faults


@pytest.fixture
def disk(tmp_path):
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("mounting a file system needs root and mkfs.ext4")
    disk = disks.Disk(tmp_path, "-o", "loop")
    with disk.image.open("wb") as file:
        file.truncate(32 << 20)
    assert disks.run("mkfs.ext4", "-q", str(disk.image)).returncode == 0
    disk.mount()
    yield disk
    if os.path.ismount(disk.root):
        disk.unmount()


class Cut(BaseException):
    """The machine is gone."""


class CutFileSystem(LocalFileSystem):
    """The power goes at the k-th operation from now on."""

    def __init__(self, disk):
        self.disk, self.left = disk, -1

    def step(self):
        self.left -= 1
        if self.left == 0:
            self.disk.cut()
            raise Cut

    def make_folder(self, path):
        self.step()
        super().make_folder(path)

    def create(self, path):
        self.step()
        return CutWriter(self, super().create(path))

    def rename(self, source, target):
        self.step()
        super().rename(source, target)

    def sync_folder(self, path):
        self.step()
        super().sync_folder(path)

    def remove_file(self, path):
        self.step()
        super().remove_file(path)

    def remove_folder(self, path):
        self.step()
        super().remove_folder(path)


class CutWriter:
    def __init__(self, fs, real):
        self.fs, self.real = fs, real

    def write(self, data):
        self.fs.step()
        self.real.write(data)

    def sync(self):
        self.fs.step()
        self.real.sync()

    def close(self):
        self.real.close()  # even a dead process lets go of its files
        self.fs.step()


def payload(value, size=4096):
    group = {name: torch.full((size,), float(value)) for name in "ab"}
    return {"model": group, "ema": group, "optimizer": group}


def value_of(stored):
    (value,) = {float(v) for group in stored.tensors.values() for t in group.values() for v in t.unique()}
    assert stored.state == {"value": value}
    return value


def newest_value(folder, passed_over):
    """0 if there is no checkpoint. What was read is let go: it may be mapped, which keeps the disk busy."""
    found = CheckpointStore(folder).load_newest(passed_over.append)
    return 0.0 if found is None else value_of(found)


def test_after_a_power_cut_at_any_moment_of_a_save_every_acknowledged_checkpoint_is_there(disk, how_often):
    cuts, rng, acknowledged, passed_over = how_often(6, 30), random.Random(0), 0.0, []
    for cut in range(cuts):
        fs = CutFileSystem(disk)
        store = CheckpointStore(disk.root / "run", keep_last=2, fs=fs, sole_writer=True)
        if cut % 3 == 0:
            value = acknowledged + 1
            store.save(int(value), payload(value), {"value": value})
            acknowledged = value
        fs.left, value = rng.randint(1, 45), acknowledged + 1
        try:
            while True:
                store.save(int(value), payload(value), {"value": value})
                acknowledged, value = value, value + 1
        except Cut:
            pass
        disk.unmount()
        disk.mount()
        newest = newest_value(disk.root / "run", passed_over)
        assert newest in (acknowledged, acknowledged + 1), f"cut {cut}"
        acknowledged = newest
    assert passed_over == []
    assert acknowledged >= cuts // 3


def test_a_writer_that_does_not_sync_loses_what_it_promised(disk):
    """So the test above can fail."""

    class Hasty(CutFileSystem):
        def create(self, path):
            writer = super().create(path)
            writer.sync = lambda: None
            return writer

        def sync_folder(self, path):
            assert path.is_dir()

    store = CheckpointStore(disk.root / "run", fs=Hasty(disk))
    store.save(1, payload(1), {"value": 1.0})
    disk.cut()
    disk.unmount()
    disk.mount()
    assert CheckpointStore(disk.root / "run").load_newest(lambda reason: None) is None


def spike(folder):
    guard = Guard(GuardConfig(spike_factor=2.0, on_spike="rewind"), folder)
    for step in range(20):
        guard.judge(step, 0.5, 1.0, range(1))
    assert guard.judge(20, 0.5, 9.0, range(1)) == "rewind"


def log_then_repair(folder):
    log = RunLog(folder, -1, tensorboard=False)
    log.write("train", 1, loss=0.5)
    log.close()
    RunLog(folder, 1, tensorboard=False).close()


WRITES = {
    "settings": (lambda folder: write_text(folder / "config.yaml", "seed: 1\n"), "config.yaml", b"seed: 1\n"),
    "mark": (lambda folder: mark_preempted(folder, 7, "SIGTERM"), "PREEMPTED", b"step: 7\n"),
    "rewind": (spike, "rewinds.json", b"20"),
    "repaired log": (log_then_repair, "log.jsonl", b'"step": 1'),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_else_a_run_depends_on_is_there_after_a_power_cut(disk, name):
    write, file, part = WRITES[name]
    folder = disk.root / "run"
    folder.mkdir()
    os.sync()  # the folder itself is older than the cut
    write(folder)
    disk.cut()
    gc.collect()
    disk.unmount()
    disk.mount()
    assert part in (folder / file).read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    disk = disks.small_disk(tmp_path, "8m")
    yield disk.root
    disk.unmount()


class Blind(LocalFileSystem):
    """Believes that there is room, as on a disk that another program fills meanwhile."""

    def free_bytes(self, path):
        return 1 << 40


@pytest.mark.parametrize("fs", [LocalFileSystem(), Blind()], ids=["refused early", "full in the middle"])
def test_a_disk_that_is_really_full_costs_nothing_and_is_named_with_its_bytes(small_disk, fs):
    store = CheckpointStore(small_disk / "run", keep_last=2, fs=fs)
    store.save(1, payload(1, 100_000), {"value": 1.0})
    store.save(2, payload(2, 100_000), {"value": 2.0})
    before = {path: path.read_bytes() for path in (small_disk / "run").rglob("*") if path.is_file()}
    with pytest.raises(StorageError, match=r"needs [\d,]+ bytes") as caught:
        store.save(3, payload(3, 200_000), {"value": 3.0})
    assert str(small_disk) in str(caught.value)
    assert {path: path.read_bytes() for path in (small_disk / "run").rglob("*") if path.is_file()} == before
    again = CheckpointStore(small_disk / "run", keep_last=1)
    again.save(3, payload(3, 100_000), {"value": 3.0})
    assert value_of(again.load_newest(pytest.fail)) == 3
    assert sorted(path.name for path in (small_disk / "run").iterdir()) == ["LATEST", "step-0000000003"]


def test_a_disk_that_is_full_before_the_first_byte_leaves_no_trace(small_disk):
    (small_disk / "other").write_bytes(b"x" * (7 << 20))
    with pytest.raises(StorageError, match="bytes"):
        CheckpointStore(small_disk / "run").save(1, payload(1, 100_000), {"value": 1.0})
    assert not list((small_disk / "run").iterdir())
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        Path(small_disk / "more").write_bytes(b"x" * (2 << 20))
