import errno
import json
import os
import random
import re
import shutil
import threading
import time

import pytest
import safetensors.torch
import torch

from smalti.checkpoints import CheckpointStore
from smalti.errors import CheckpointError, NumericError, StorageError
from smalti.storage.sealed import seal


def never(message):
    raise AssertionError(f"skipped: {message}")


def save(store, step, faults):
    return store.save(step, faults.payload(step), {"value": step})


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    tensors = {
        "model": {
            "half": torch.randn(4, 3).bfloat16(),
            "double": torch.randn(2, 2, dtype=torch.float64),
            "turned": torch.arange(6.0).view(2, 3).t(),
            "scalar": torch.tensor(7),
            "empty": torch.zeros(0, 3),
            "mask": torch.tensor([True, False, True]),
        },
        "optimizer": {"step": torch.tensor(3, dtype=torch.int32)},
    }
    state = {"seed": 2**62 + 1, "loss": 0.1 + 0.2, "names": ["a", "ü"], "none": None}
    store = CheckpointStore(tmp_path / "deep" / "checkpoints")
    path = store.save(12, tensors, state)
    assert path.name == "step-0000000012"
    assert (path.parent / "LATEST").read_text() == "step-0000000012\n"
    found = store.load_newest(never)
    assert (found.step, found.state, found.path) == (12, state, path)
    for group, members in tensors.items():
        assert found.tensors[group].keys() == members.keys()
        for name, tensor in members.items():
            back = found.tensors[group][name]
            assert back.dtype == tensor.dtype
            assert torch.equal(back, tensor)


def test_the_files_are_what_the_safetensors_library_itself_reads_and_writes(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(5).half(), "c": torch.arange(4)}
    path = CheckpointStore(tmp_path).save(1, {"model": tensors}, {}) / "model.safetensors"
    assert all(torch.equal(tensors[k], v) for k, v in safetensors.torch.load_file(path).items())
    library = tmp_path / "library.safetensors"
    safetensors.torch.save_file(tensors, library)
    assert path.stat().st_size <= library.stat().st_size + 64
    offsets = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert [offsets[k]["data_offsets"][0] % tensors[k].element_size() for k in "abc"] == [0, 0, 0]


def test_loaded_tensors_do_not_follow_the_file(tmp_path, faults):
    store = CheckpointStore(tmp_path)
    path = save(store, 1, faults)
    found = store.load(1)
    assert faults.value_of(found) == 1
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-4:] = b"\x00\x00\x00\x00"
    with (path / "model.safetensors").open("r+b") as file:
        file.write(data)
    assert faults.value_of(found) == 1


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        store = CheckpointStore(folder)
        assert store.steps() == []
        assert store.load_newest(never) is None
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; it has: none"):
        store.load(5)


def test_only_the_newest_and_every_nth_are_kept(tmp_path, faults):
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=40)
    for step in range(10, 101, 10):
        save(store, step, faults)
    assert store.steps() == [40, 80, 90, 100]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_step_that_goes_back_is_kept_although_older_ones_have_larger_numbers(tmp_path, faults):
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 100, faults)
    save(store, 50, faults)
    assert store.steps() == [50, 100]


def test_saving_a_step_again_replaces_it(tmp_path, faults):
    store = CheckpointStore(tmp_path)
    save(store, 10, faults)
    store.save(10, faults.payload(11), {"value": 11})
    assert faults.value_of(store.load(10)) == 11
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-0000000010"]


def test_of_two_threads_that_save_at_the_same_moment_the_second_waits_for_the_first(tmp_path, faults):
    fs, order = faults.QuickFileSystem(), []
    real = fs.create

    def create(path):
        order.append(threading.get_ident())
        time.sleep(0.01)  # the other one's turn, if nothing held it back
        return real(path)

    fs.create = create
    store, start = CheckpointStore(tmp_path, keep_last=1, fs=fs), threading.Barrier(2)
    threads = [
        threading.Thread(target=lambda step=step: (start.wait(60), save(store, step, faults))) for step in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(order)) == 2
    assert order == sorted(order, key=order.index)
    assert faults.value_of(store.load(2)) == 2


@pytest.mark.faults
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", ["model", "ema", "optimizer"])
def test_weights_that_are_not_finite_are_refused_and_displace_nothing(tmp_path, faults, bad, group):
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 10, faults)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    tensors = faults.payload(20)
    tensors[group]["a.bias"][3] = bad
    for step in (10, 20):
        with pytest.raises(NumericError, match=rf"group '{group}': a.bias"):
            store.save(step, tensors, {"value": 20})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("step", "group"), [(-1, "model"), (10**10, "model"), (1, "../model"), (1, "Model")])
def test_steps_and_groups_that_cannot_be_names_are_refused(tmp_path, step, group):
    with pytest.raises(ValueError, match=r"step|group"):
        CheckpointStore(tmp_path).save(step, {group: {"a": torch.zeros(1)}}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_too_little_space_is_refused_before_anything_is_written(tmp_path, faults):
    fs = faults.FileSystem(tmp_path)
    store = CheckpointStore(tmp_path, fs=fs)
    save(store, 1, faults)
    fs.free, written = 1000, fs.names.count("create")
    with pytest.raises(StorageError, match=r"needs [\d,]+ bytes .* 1,000 are free") as error:
        save(store, 2, faults)
    assert str(tmp_path) in str(error.value)
    assert fs.names.count("create") == written
    assert store.steps() == [1]


def prepared(root, faults, *, keep_last, again):
    """Two stored checkpoints, and the number of calls that one more save takes."""
    fs = faults.FileSystem(root)
    store = CheckpointStore(root / "run", fs=fs, keep_last=keep_last)
    save(store, 10, faults)
    save(store, 20, faults)
    fs.calls = 0
    fs.names.clear()
    step = 20 if again else 30
    return fs, store, lambda: store.save(step, faults.payload(30), {"value": 30})


def crash_points(tmp_path, faults, **kw):
    fs, _, act = prepared(tmp_path / "count", faults, **kw)
    act()
    return fs.calls


@pytest.mark.faults
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_process_killed_at_any_point_of_a_save_loses_nothing(tmp_path, faults, keep_last, again):
    (tmp_path / "count").mkdir()
    total = crash_points(tmp_path, faults, keep_last=keep_last, again=again)
    assert total >= 40
    for k in range(1, total + 1):
        root = tmp_path / str(k)
        root.mkdir()
        with faults.dying_process():
            fs, _, act = prepared(root, faults, keep_last=keep_last, again=again)
            fs.fault = faults.crash_at(k)
            with pytest.raises(faults.Crash):
                act()
        after = CheckpointStore(root / "run", keep_last=keep_last, fs=faults.QuickFileSystem())
        assert faults.value_of(after.load_newest(never)) in (20, 30), f"call {k}"
        save(after, 40, faults)  # the next start clears what the dead one left
        assert not [p.name for p in (root / "run").iterdir() if p.name.startswith(".")], f"call {k}"
        assert faults.value_of(after.load_newest(never)) == 40
        shutil.rmtree(root)


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["lost", "names", "mixed", "unordered"])
@pytest.mark.parametrize("again", [False, True], ids=["new-step", "same-step"])
def test_a_power_cut_at_any_point_of_a_save_loses_nothing(tmp_path, faults, mode, again):
    (tmp_path / "count").mkdir()
    total = crash_points(tmp_path, faults, keep_last=1, again=again)
    for k in range(1, total + 2):  # the last one: the power goes after the save has returned
        root = tmp_path / str(k)
        root.mkdir()
        fs, _, act = prepared(root, faults, keep_last=1, again=again)
        fs.fault = faults.crash_at(k)
        if k <= total:
            with pytest.raises(faults.Crash):
                act()
        else:
            act()
        for seed in range(4 if mode == "unordered" else 1):
            disk = fs.after_power_cut(tmp_path / f"{k}-after-{seed}", mode, seed=k + 1000 * seed)
            found = CheckpointStore(disk / "run").load_newest(never)
            assert found is not None, f"call {k}"
            assert faults.value_of(found) in ((30,) if k > total else (20, 30)), f"call {k}"
            for path in (disk / "run").glob("step-*"):  # one being deleted is whole, or has lost its name
                CheckpointStore(disk / "run").verify(path)
            shutil.rmtree(disk)
        shutil.rmtree(root)


@pytest.mark.faults
def test_the_power_cut_model_catches_a_writer_that_does_not_sync(tmp_path, faults):
    class Hasty(faults.FileSystem):
        def sync_folder(self, path):
            self.step("sync_folder")

    fs = Hasty(tmp_path)
    save(CheckpointStore(tmp_path / "run", fs=fs), 10, faults)
    disk = fs.after_power_cut(tmp_path.parent / "after-hasty", "lost")
    assert CheckpointStore(disk / "run").load_newest(never) is None


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "lasting"),
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, False), (errno.EIO, False)],
    ids=["ENOSPC once", "ENOSPC lasting", "EDQUOT lasting", "EFBIG once", "EIO once"],
)
def test_a_disk_that_fails_at_any_call_costs_no_stored_checkpoint(tmp_path, faults, number, lasting):
    (tmp_path / "count").mkdir()
    total = crash_points(tmp_path, faults, keep_last=1, again=False)
    for k in range(1, total + 1):
        root = tmp_path / str(k)
        root.mkdir()
        with faults.dying_process():
            fs, store, act = prepared(root, faults, keep_last=1, again=False)
            fs.fault = faults.fail_at(k, number, lasting=lasting)
            with pytest.raises(StorageError, match=r"needs [\d,]+ bytes, .* bytes are free") as error:
                act()
            assert str(root / "run") in str(error.value)
            assert os.strerror(number) in str(error.value)
            fs.fault = lambda call, name: None
            if not lasting:  # this process goes on, and nobody sweeps what a living one has begun
                assert not list((root / "run").glob(".tmp-0*")), f"call {k}"
            value = faults.value_of(store.load_newest(never))
            assert value in (20, 30), f"call {k}"
            if "itself is stored" in str(error.value):
                disk = fs.after_power_cut(tmp_path / f"{k}-after", "lost")
                assert faults.value_of(CheckpointStore(disk / "run").load(30)) == 30
        after = CheckpointStore(root / "run", keep_last=1, fs=faults.QuickFileSystem())
        assert faults.value_of(after.load_newest(never)) == value
        save(after, 40, faults)
        assert sorted(p.name for p in (root / "run").iterdir()) == ["LATEST", "step-0000000040"], f"call {k}"
        shutil.rmtree(root)


@pytest.mark.faults
@pytest.mark.parametrize("which", [0, 1], ids=["aside", "into-place"])
def test_a_checkpoint_that_cannot_be_replaced_stands_where_it_was(tmp_path, faults, which):
    (tmp_path / "count").mkdir()
    fs, _, act = prepared(tmp_path / "count", faults, keep_last=1, again=True)
    act()
    k = [call for call, name in enumerate(fs.names, 1) if name == "rename"][which]
    fs, store, act = prepared(tmp_path, faults, keep_last=1, again=True)
    fs.fault = faults.fail_at(k, errno.EIO, lasting=False)
    with pytest.raises(StorageError, match=re.escape(os.strerror(errno.EIO))):
        act()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["LATEST", "step-0000000020"]
    assert faults.value_of(store.load_newest(never)) == 20


@pytest.mark.faults
def test_a_file_size_limit_of_the_real_system_is_a_storage_error(tmp_path, faults):
    resource = pytest.importorskip("resource")
    store = CheckpointStore(tmp_path)
    save(store, 1, faults)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            store.save(2, {"model": {"a": torch.zeros(100_000)}}, {"value": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.steps() == [1]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.faults
def test_every_flipped_bit_and_every_cut_is_found_and_the_older_checkpoint_taken(tmp_path, faults, how_often):
    flips, cuts = how_often(60, 400), how_often(60, 200)
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 10, faults)
    path = save(store, 20, faults)
    rng = random.Random(0)
    files = sorted(path.iterdir())
    assert len(files) == 6
    for i in range(flips + cuts):
        file = files[i % len(files)]
        good = file.read_bytes()
        if i < flips:
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else:
            bad = good[: rng.randrange(len(good))]
        file.write_bytes(bad)
        skipped = []
        assert faults.value_of(store.load_newest(skipped.append)) == 10
        assert len(skipped) == 1
        assert file.name in skipped[0]
        assert "step-0000000020" in skipped[0]
        with pytest.raises(CheckpointError, match=file.name):
            store.load(20)
        with pytest.raises(CheckpointError, match=file.name):
            store.verify(path)
        file.write_bytes(good)
    store.verify(path)


def test_a_missing_file_and_a_renamed_folder_are_found(tmp_path, faults):
    store = CheckpointStore(tmp_path)
    path = save(store, 10, faults)
    path.rename(tmp_path / "step-0000000099")
    with pytest.raises(CheckpointError, match="of step 10 under another name"):
        store.load(99)
    (tmp_path / "step-0000000099" / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is missing"):
        store.load(99)
    skipped = []
    assert store.load_newest(skipped.append) is None
    assert len(skipped) == 1


@pytest.mark.faults
def test_a_damaged_new_checkpoint_stops_the_deletion_of_old_ones(tmp_path, faults):
    class Lossy(faults.FileSystem):
        """Says yes to everything, and stores a wrong byte."""

        lossy = False

        def sync_folder(self, path):
            super().sync_folder(path)
            for file in path.glob("ema.safetensors") if self.lossy else ():
                file.write_bytes(file.read_bytes()[:-1] + b"?")

    fs = Lossy(tmp_path)
    store = CheckpointStore(tmp_path, keep_last=1, fs=fs)
    save(store, 10, faults)
    fs.lossy = True
    with pytest.raises(StorageError, match="no older checkpoint is deleted"):
        save(store, 20, faults)
    skipped = []
    assert faults.value_of(store.load_newest(skipped.append)) == 10
    assert len(skipped) == 1


@pytest.mark.faults
def test_a_manifest_cannot_lead_outside_its_folder(tmp_path, faults):
    store = CheckpointStore(tmp_path)
    path = save(store, 1, faults)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    manifest["files"]["../LATEST"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./LATEST'"):
        store.load(1)


@pytest.mark.faults
def test_a_newer_format_is_refused_and_not_skipped(tmp_path, faults):
    store = CheckpointStore(tmp_path)
    save(store, 1, faults)
    path = save(store, 2, faults)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    (path / "manifest.json").write_bytes(seal(manifest | {"version": 3, "smalti": "9.9"}))
    for read in (lambda: store.load_newest(never), lambda: store.load(2)):
        with pytest.raises(CheckpointError, match=r"version 3, written by smalti 9.9; .* update it"):
            read()


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.faults
def test_leftovers_of_dead_writers_are_swept_and_those_of_living_ones_stay(tmp_path, faults):
    fs = faults.FileSystem(tmp_path)
    store = CheckpointStore(tmp_path, fs=fs)
    fs.fault = faults.crash_at(12)
    with pytest.raises(faults.Crash):
        save(store, 1, faults)
    assert len(leftovers(tmp_path)) == 1  # of this very process, which lives
    CheckpointStore(tmp_path).sweep()
    assert len(leftovers(tmp_path)) == 1
    with faults.dying_process():
        fs = faults.FileSystem(tmp_path)
        fs.fault = faults.crash_at(12)
        with pytest.raises(faults.Crash):
            save(CheckpointStore(tmp_path, fs=fs), 2, faults)
    assert len(leftovers(tmp_path)) == 2
    CheckpointStore(tmp_path).sweep()
    assert len(leftovers(tmp_path)) == 1


@pytest.mark.faults
def test_leftovers_of_a_foreign_machine_are_swept_only_by_the_sole_writer(tmp_path, faults):
    with faults.dying_process(host="elsewhere", boot="another"):
        fs = faults.FileSystem(tmp_path)
        fs.fault = faults.crash_at(12)
        with pytest.raises(faults.Crash):
            save(CheckpointStore(tmp_path, fs=fs), 2, faults)
    CheckpointStore(tmp_path).sweep()
    assert len(leftovers(tmp_path)) == 1
    CheckpointStore(tmp_path, sole_writer=True).sweep()
    assert leftovers(tmp_path) == []


@pytest.mark.faults
def test_leftovers_from_before_a_reboot_are_swept(tmp_path, faults):
    with faults.dying_process(boot="before"):
        fs = faults.FileSystem(tmp_path)
        fs.fault = faults.crash_at(12)
        with pytest.raises(faults.Crash):
            save(CheckpointStore(tmp_path, fs=fs), 2, faults)
    CheckpointStore(tmp_path).sweep()
    assert leftovers(tmp_path) == []


@pytest.mark.faults
def test_a_replaced_checkpoint_returns_when_its_successor_is_damaged(tmp_path, faults):
    store = CheckpointStore(tmp_path)
    path = save(store, 10, faults)
    with faults.dying_process():
        from smalti.checkpoints.layout import nonce

        aside = tmp_path / f".old-0000000010-{nonce()}"
    shutil.copytree(path, aside)
    (path / "state.json").write_bytes(b"{}")
    skipped = []
    found = store.load_newest(skipped.append)
    assert (found.path, len(skipped)) == (aside, 1)
    store.sweep()
    assert store.load_newest(never).path == path
