"""Checkpoints that several processes write together; here each process is a thread."""

import errno
import json
import os
import random
import re
import shutil

import pytest
import torch

from smalti.checkpoints import CheckpointStore, Piece
from smalti.errors import CheckpointError, NumericError, SmaltiError, StorageError
from smalti.storage.sealed import seal


def never(message):
    raise AssertionError(f"skipped: {message}")


def save(folder, size, step, faults, *, fs=None, value=None, **kw):
    """One save by `size` processes; what each got. `fs` by rank."""
    value = step if value is None else value

    def act(world):
        own = faults.QuickFileSystem() if fs is None else fs[world.rank]
        store = CheckpointStore(folder, world=world, fs=own, **kw)
        return store.save(step, faults.parts(world, value), {"value": value})

    return faults.in_ranks(size, act)


def whole_tensors():
    generator = torch.Generator().manual_seed(0)
    random_ = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "wide": random_(11, 3),
        "half": random_(7, 2, 2).bfloat16(),
        "few": torch.arange(2),  # fewer rows than processes
        "flat": random_(9).double(),
        "turned": random_(3, 8).t(),
        "empty": torch.zeros(0, 4),
        "mask": random_(8) > 0,
    }


@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_what_any_number_of_processes_wrote_any_number_reads(tmp_path, faults, writers):
    whole = whole_tensors()
    scalar, alone = torch.tensor(3, dtype=torch.int32), torch.arange(6.0).reshape(3, 2)

    def write(world):
        def piece(tensor):
            mine = world.share(len(tensor), 1)
            return Piece(tensor[mine.start : mine.stop], tuple(tensor.shape), mine.start)

        model = {name: piece(tensor) for name, tensor in whole.items()}
        own = scalar if world.rank == 0 else torch.tensor(float("nan"))  # of the others nothing is written
        groups = {"model": model | {"scalar": own}, "ema": {"alone": alone}, "optimizer": {}}
        return CheckpointStore(tmp_path, world=world).save(5, groups, {"rank": world.rank}, score=0.5)

    paths = faults.in_ranks(writers, write)
    assert set(paths) == {tmp_path / "step-0000000005"}
    total = sum(t.nbytes for t in (*whole.values(), scalar, alone))
    stored = sum(file.stat().st_size for file in paths[0].glob("*.safetensors"))
    assert total <= stored <= total + writers * 1000 + 1000  # nothing is written twice

    def read(world):
        found = CheckpointStore(tmp_path, world=world).load_newest(never)
        assert (found.step, found.state, found.score, found.path) == (5, {"rank": 0}, 0.5, paths[0])
        assert found.groups() == ["model", "ema", "optimizer"]
        assert found.names("optimizer") == []
        assert torch.equal(found.tensor("model", "scalar"), scalar)
        assert torch.equal(found.tensors["ema"]["alone"], alone)
        for name, tensor in whole.items():
            mine = world.share(len(tensor), 1)
            rows = found.rows("model", name, mine.start, mine.stop)
            assert rows.dtype == tensor.dtype
            assert torch.equal(rows, tensor[mine.start : mine.stop])
            assert torch.equal(found.tensors["model"][name], tensor)
        return True

    for readers in (1, 2, 3, 4):
        assert faults.in_ranks(readers, read) == [True] * readers


def test_only_files_with_the_wanted_rows_are_read(tmp_path, faults):
    save(tmp_path, 4, 1, faults)
    found = CheckpointStore(tmp_path).load(1)
    for file in found.path.glob("*.rank-000[123].safetensors"):
        file.unlink()
    assert torch.equal(found.rows("model", "a.weight", 0, 1), torch.ones(1, 5))
    with pytest.raises(OSError, match="rank-0003"):
        found.rows("model", "a.weight", 6, 7)


def test_rows_that_do_not_exist_are_refused(tmp_path, faults):
    save(tmp_path, 2, 1, faults)
    found = CheckpointStore(tmp_path).load(1)
    with pytest.raises(ValueError, match=r"rows 3 to 8 of model.a.weight, which has 7"):
        found.rows("model", "a.weight", 3, 8)
    with pytest.raises(ValueError, match="no dimensions"):
        found.rows("optimizer", "count", 0, 1)
    with pytest.raises(KeyError):
        found.rows("model", "b", 0, 1)
    with pytest.raises(ValueError, match="no slice of a tensor"):
        Piece(torch.zeros(3, 2), (4, 2), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda piece: Piece(piece.rows[:-1], piece.shape, piece.start),
            r"do not make up model.a \[4, 2\]: 3 of 4 rows",
        ),
        (lambda piece: Piece(piece.rows, piece.shape, 1), "row 2 is followed by row 1"),
        (lambda piece: Piece(piece.rows.double(), piece.shape, piece.start), "as F64"),
        (lambda piece: Piece(piece.rows, (5, 2), piece.start), r"as F32 \[5, 2\], another one as F32 \[4, 2\]"),
        (lambda piece: Piece(piece.rows.to(torch.complex64), piece.shape, piece.start), "complex64"),
    ],
    ids=["gap", "overlap", "dtype", "shape", "unknown dtype"],
)
def test_pieces_that_do_not_fit_together_are_refused_by_all(tmp_path, faults, change, message):
    def act(world):
        piece = Piece(torch.zeros(2, 2), (4, 2), 2 * world.rank)
        piece = change(piece) if world.rank == 1 else piece
        CheckpointStore(tmp_path, world=world).save(1, {"model": {"a": piece}}, {})

    for error in faults.in_ranks(2, act):
        assert isinstance(error, ValueError | TypeError)
        with pytest.raises(type(error), match=message):
            raise error
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []


@pytest.mark.faults
@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_a_value_that_is_not_finite_on_one_process_stops_all(tmp_path, faults, bad_rank):
    save(tmp_path, 3, 10, faults, keep_last=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def act(world):
        groups = faults.parts(world, 20)
        if world.rank == bad_rank:
            groups["ema"]["a.bias"].rows[0] = float("inf")
        CheckpointStore(tmp_path, world=world, keep_last=1).save(20, groups, {})

    errors = faults.in_ranks(3, act)
    assert [type(error) for error in errors] == [NumericError] * 3
    assert all("a.bias" in str(error) for error in errors)
    assert [f"process {bad_rank} of the run" in str(error) for error in errors] == [r != bad_rank for r in range(3)]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_processes_that_save_different_steps_are_refused(tmp_path, faults):
    act = lambda world: CheckpointStore(tmp_path, world=world).save(world.rank, {}, {})  # noqa: E731
    assert all("save different steps" in str(error) for error in faults.in_ranks(2, act))
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_what_all_processes_write(tmp_path, faults):
    fs, free = faults.FileSystem(tmp_path), []

    def act(world):
        own = fs.view()
        own.free = free[0]
        return CheckpointStore(tmp_path / "run", world=world, fs=own).save(1, faults.parts(world, 1, rows=2000), {})

    free.append(0)
    (needed,) = {re.search(r"needs ([\d,]+) bytes", str(error))[1] for error in faults.in_ranks(2, act)}
    assert int(needed.replace(",", "")) > 3 * 2000 * 6 * 4  # groups, rows, columns, bytes
    free[0] = 2 * int(needed.replace(",", ""))
    assert faults.in_ranks(2, act) == [tmp_path / "run" / "step-0000000001"] * 2


def test_processes_that_do_not_see_the_same_checkpoint_are_told_so(tmp_path, faults):
    for rank in range(2):
        save(tmp_path / f"{rank}", 1, 10, faults, value=rank)
    skipped = []
    act = lambda world: CheckpointStore(tmp_path / f"{world.rank}", world=world).load_newest(skipped.append)  # noqa: E731
    assert faults.in_ranks(2, act) == [None, None]
    assert len(skipped) == 1
    assert "not the same for all processes" in skipped[0]


SIZE = 2


def prepared(root, faults):
    """Two checkpoints of two processes, and a file system for each that counts from here."""
    fs = faults.FileSystem(root)
    views = [fs, fs.view()]
    for step in (10, 20):
        assert set(save(root / "run", SIZE, step, faults, fs=views, keep_last=1)) == {
            root / "run" / f"step-{step:010d}"
        }
    for view in views:
        view.calls = 0
    return views


def act(root, faults, views):
    return save(root / "run", SIZE, 30, faults, fs=views, keep_last=1)


def calls_of_a_save(tmp_path, faults):
    (tmp_path / "count").mkdir()
    views = prepared(tmp_path / "count", faults)
    act(tmp_path / "count", faults, views)
    counts = [view.calls for view in views]
    assert counts[0] >= 50
    assert counts[1] >= 12
    return [(rank, k) for rank in range(SIZE) for k in range(1, counts[rank] + 1)]


@pytest.mark.faults
def test_any_process_killed_at_any_point_of_a_save_costs_nothing_and_holds_up_nobody(tmp_path, faults):
    for rank, k in calls_of_a_save(tmp_path, faults):
        root = tmp_path / f"{rank}-{k}"
        root.mkdir()
        with faults.dying_process():
            views = prepared(root, faults)
            views[rank].fault = faults.crash_at(k)
            outcomes = act(root, faults, views)
            assert isinstance(outcomes[rank], faults.Crash), (rank, k)
            assert isinstance(outcomes[1 - rank], SmaltiError), (rank, k)
            assert "waited for another one that ended" in str(outcomes[1 - rank])
        after = CheckpointStore(root / "run", keep_last=1, fs=faults.QuickFileSystem())
        assert faults.value_of(after.load_newest(never)) in (20, 30), (rank, k)
        save(root / "run", 3, 40, faults, keep_last=1)  # the next start, with other processes, clears what is left
        assert sorted(p.name for p in (root / "run").iterdir()) == ["LATEST", "step-0000000040"], (rank, k)
        assert faults.value_of(after.load_newest(never)) == 40
        shutil.rmtree(root)


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["lost", "names", "mixed"])
def test_a_power_cut_of_all_at_any_point_of_a_save_costs_nothing(tmp_path, faults, mode):
    for rank, k in [*calls_of_a_save(tmp_path, faults), (0, None)]:
        root = tmp_path / f"{rank}-{k}"
        root.mkdir()
        views = prepared(root, faults)
        if k is not None:
            views[rank].fault = faults.crash_at(k)
        outcomes = act(root, faults, views)
        disk = views[0].after_power_cut(tmp_path / f"{rank}-{k}-after", mode, seed=k or 0)
        found = CheckpointStore(disk / "run").load_newest(never)
        acknowledged = not any(isinstance(outcome, BaseException) for outcome in outcomes)
        assert acknowledged == (k is None)
        assert faults.value_of(found) in ((30,) if acknowledged else (20, 30)), (rank, k)
        shutil.rmtree(root)
        shutil.rmtree(disk)


@pytest.mark.faults
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_disk_that_fails_for_one_process_at_any_call_is_an_error_for_all(tmp_path, faults, number, lasting):
    for rank, k in calls_of_a_save(tmp_path, faults):
        root = tmp_path / f"{rank}-{k}"
        root.mkdir()
        views = prepared(root, faults)
        views[rank].fault = faults.fail_at(k, number, lasting=lasting)
        outcomes = act(root, faults, views)
        assert [type(outcome) for outcome in outcomes] == [StorageError] * SIZE, (rank, k)
        assert all(os.strerror(number) in str(outcome) for outcome in outcomes)
        views[rank].fault = lambda call, name: None
        value = faults.value_of(CheckpointStore(root / "run").load_newest(never))
        stored = ["itself is stored" in str(outcome) for outcome in outcomes]
        assert stored[0] == stored[1]
        assert value == 30 if stored[0] else value in (20, 30), (rank, k)
        if rank == 1:  # the first process could clean up
            assert not list((root / "run").glob(".*")), (rank, k)
        shutil.rmtree(root)


@pytest.mark.faults
def test_every_flip_and_cut_in_any_file_of_any_process_is_found_by_all(tmp_path, faults):
    save(tmp_path, 3, 10, faults)
    save(tmp_path, 3, 20, faults)
    path = tmp_path / "step-0000000020"
    files, rng = sorted(path.iterdir()), random.Random(0)
    assert len(files) == 3 * 3 + 3
    for i in range(96):
        file = files[i % len(files)]
        good = file.read_bytes()
        if i < 48:
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else:
            bad = good[: rng.randrange(len(good))]
        file.write_bytes(bad)

        def read(world, name=file.name):
            skipped = []
            found = CheckpointStore(tmp_path, world=world).load_newest(skipped.append)
            assert len(skipped) == (world.rank == 0)
            assert all(name in line and "step-0000000020" in line for line in skipped)
            return faults.value_of(found)

        size = 1 + i % 3
        assert faults.in_ranks(size, read) == [10.0] * size, file.name
        file.write_bytes(good)
    CheckpointStore(tmp_path).verify(path)


def test_a_missing_file_is_found(tmp_path, faults):
    save(tmp_path, 3, 10, faults)
    (tmp_path / "step-0000000010" / "ema.rank-0002.safetensors").unlink()
    for error in faults.in_ranks(2, lambda world: CheckpointStore(tmp_path, world=world).load(10)):
        assert isinstance(error, CheckpointError)
        assert "ema.rank-0002.safetensors" in str(error)


def reindexed(path, change):
    """Write another index as the writer itself would."""
    from smalti.storage.filesystem import read_record

    index = json.loads((path / "index.json").read_bytes())
    change(index)
    (path / "index.json").write_text(json.dumps(index))
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["digest"]
    manifest["files"]["index.json"] = read_record(path / "index.json")._asdict()
    (path / "manifest.json").write_bytes(seal(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry[2].pop(), "3 of 7 rows are there"),
        (lambda entry: entry[2].reverse(), "row 0 is followed by row 3"),
        (lambda entry: entry[2].append(["ema.rank-0000.safetensors", 3, 4]), "row 7 is followed by row 3"),
        (lambda entry: entry[2].__setitem__(0, ["../LATEST", 0, 3]), "is no file of this checkpoint"),
        (lambda entry: entry.__setitem__(2, "none"), "is not what its manifest promises"),
    ],
    ids=["gap", "order", "overlap", "outside", "nonsense"],
)
def test_an_index_that_does_not_make_up_its_tensors_is_refused(tmp_path, faults, change, message):
    save(tmp_path, 2, 10, faults)
    path = tmp_path / "step-0000000010"
    reindexed(path, lambda index: change(index["model"]["a.weight"]))
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path).load(10)


def test_an_index_that_contradicts_its_files_is_refused_when_rows_are_read(tmp_path, faults):
    save(tmp_path, 2, 10, faults)

    def change(index):
        index["model"]["a.weight"][1] = [7, 4]
        index["model"]["b"] = index["model"]["a.bias"]
        index["optimizer"]["count"][0] = "F64"

    reindexed(tmp_path / "step-0000000010", change)
    found = CheckpointStore(tmp_path).load(10)
    with pytest.raises(CheckpointError, match=r"a.weight as F32 \[3, 5\], its manifest says F32 \[3, 4\]"):
        found.tensor("model", "a.weight")
    with pytest.raises(CheckpointError, match="does not hold b"):
        found.tensor("model", "b")
    with pytest.raises(CheckpointError, match=r"count as I64 \[\], its manifest says F64 \[\]"):
        found.tensor("optimizer", "count")
