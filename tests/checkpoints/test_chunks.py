"""Chunks: there whole or not at all, made by one process at a time, free again when that process is dead."""

import contextlib
import errno
import threading

import pytest
import torch

from smalti.errors import StorageError
from smalti.storage import chunks as module
from smalti.storage.chunks import ChunkStore, Claims, DamagedChunkError


def content(index):
    return {"images": torch.full((2, 3, 4), index, dtype=torch.uint8), "sums": torch.arange(3) + index}


def store_of(folder, count=4, identity="a", fs=None):
    store = ChunkStore(folder, count, identity, fs=fs)
    store.open()
    return store


def put(store, *indices):
    with contextlib.closing(store.work(indices)) as chunks:
        for index in chunks:
            store.write(index, content(index))


def same(found, index):
    return found.keys() == content(index).keys() and all(torch.equal(found[k], v) for k, v in content(index).items())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_and_no_longer_missing(tmp_path):
    store = store_of(tmp_path / "deep" / "chunks")
    assert store.missing() == [0, 1, 2, 3]
    put(store, 2, 0)
    assert store.missing() == [1, 3]
    assert store.missing([3, 2, 1]) == [3, 1]
    assert not store.complete()
    put(store, 1, 3)
    assert store.complete()
    assert all(same(store.read(index), index) for index in range(4))


def test_the_bytes_of_a_chunk_depend_on_its_content_alone(tmp_path):
    one, other = store_of(tmp_path / "one"), store_of(tmp_path / "other")
    put(one, 0, 1, 2)
    put(other, 2, 1, 0)
    for index in range(3):
        assert one.path(index).read_bytes() == other.path(index).read_bytes()


def test_a_chunk_is_claimed_once_and_again_only_when_it_was_let_go_unmade(tmp_path):
    first, second = store_of(tmp_path), store_of(tmp_path)
    with first.claim(0) as claim:
        assert claim is not None
        assert second.claim(0) is None
        assert first.claim(0) is None
        assert second.in_use()
        with second.claim(1) as other:
            assert other is not None
    assert not second.in_use()
    put(second, 0)
    assert first.claim(0) is None


def test_the_finish_has_one_holder_too(tmp_path):
    first, second = store_of(tmp_path), store_of(tmp_path)
    with first.claim_finish():
        assert second.claim_finish() is None
    with second.claim_finish() as claim:
        assert claim is not None


def test_a_claim_whose_file_was_removed_by_its_holder_is_not_held_twice(tmp_path, monkeypatch):
    """The classic trap of lock files: B has A's file open when A removes it; C makes and locks a new one."""
    claims, real = Claims(tmp_path), module._locked
    first = claims.take("x")

    def late(descriptor):
        monkeypatch.setattr(module, "_locked", real)
        first.release(remove=True)
        assert real(descriptor)  # the lock of a file that nobody can find any more
        late.third = claims.take("x")
        return True

    monkeypatch.setattr(module, "_locked", late)
    assert claims.take("x") is None
    assert late.third is not None


def test_a_held_name_is_waited_for_and_its_file_taken_away(tmp_path):
    order = []

    def second():
        with Claims(tmp_path).hold("x"):
            order.append("second")

    with Claims(tmp_path).hold("x"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert names(tmp_path) == []


def test_work_yields_what_is_missing_from_its_start_on_and_waits_for_nobody_who_is_done(tmp_path):
    store = store_of(tmp_path, count=6)
    put(store, 4)
    made = []
    for index in store.work(range(6), start=3):
        made.append(index)
        store.write(index, content(index))
    assert made == [3, 5, 0, 1, 2]
    assert list(store.work(range(6))) == []
    assert names(tmp_path) == [f"chunk-{index:08d}.safetensors" for index in range(6)]


def test_work_stops_when_it_is_over_also_after_a_claim(tmp_path):
    store = store_of(tmp_path)
    answers = iter([False, False, True])
    assert list(store.work(range(4), over=lambda: next(answers))) == []
    assert store.claim(0) is not None


def test_work_takes_over_what_another_lets_go(tmp_path):
    store, other = store_of(tmp_path), store_of(tmp_path)
    put(store, 1, 2, 3)
    claim = other.claim(0)
    timer = threading.Timer(0.1, claim.release)
    timer.start()
    assert next(store.work(range(4))) == 0
    timer.join()


def test_where_file_locks_are_not_heard_both_make_the_chunk_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(module.fcntl, "flock", raising(OSError(errno.ENOLCK, "no locks")))
    first, second = store_of(tmp_path), store_of(tmp_path)
    with first.claim(0), second.claim(0):
        first.write(0, content(0))
        second.write(0, content(0))
    assert same(first.read(0), 0)


def test_where_locks_are_not_heard_an_unfinished_file_that_was_swept_is_written_again(tmp_path):
    store = store_of(tmp_path)
    real = store._fs.rename
    swept = []

    def rename(source, target):
        if not swept:
            swept.append(source)
            source.unlink()
        real(source, target)

    store._fs.rename = rename
    put(store, 0)
    assert same(store.read(0), 0)


def raising(error):
    def function(*_):
        raise error

    return function


def test_another_error_of_the_lock_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(module.fcntl, "flock", raising(OSError(errno.EIO, "input/output error")))
    with pytest.raises(StorageError, match="claiming chunk 0"):
        store_of(tmp_path).claim(0)


def test_any_flipped_byte_is_found_or_changes_nothing(tmp_path):
    store = store_of(tmp_path)
    put(store, 0)
    whole = store.path(0).read_bytes()
    found = 0
    for place in range(len(whole)):
        store.path(0).write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            assert same(store.read(0), 0), place
        except DamagedChunkError as error:
            found += error.index == 0
    header = int.from_bytes(whole[:8], "little") + 8
    assert found >= len(whole) - header  # every byte of content, and nearly all of the header


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_cut_chunk_is_found_and_made_again(tmp_path, size):
    store = store_of(tmp_path)
    put(store, 0)
    whole = store.path(0).read_bytes()
    store.path(0).write_bytes(whole[:size])
    with pytest.raises(DamagedChunkError):
        store.read(0)
    store.discard(0)
    assert store.missing() == [0, 1, 2, 3]
    put(store, 0)
    assert store.path(0).read_bytes() == whole


def test_a_chunk_of_other_work_or_of_another_number_counts_as_damaged(tmp_path):
    store = store_of(tmp_path)
    put(store, 0)
    store.path(1).write_bytes(store.path(0).read_bytes())
    for wrong in (lambda: store.read(1), lambda: store_of(tmp_path, identity="b").read(0), lambda: store.read(2)):
        with pytest.raises(DamagedChunkError):
            wrong()
    with pytest.raises(DamagedChunkError):
        store_of(tmp_path, count=5).read(0)


def test_numbers_outside_and_no_chunks_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one chunk"):
        ChunkStore(tmp_path, 0, "a")
    with pytest.raises(ValueError, match=r"outside 0 \.\. 3"):
        store_of(tmp_path).path(4)


def test_clearing_leaves_nothing_and_claims_nothing_back(tmp_path):
    store = store_of(tmp_path / "chunks")
    put(store, 0, 1)
    (tmp_path / "chunks" / ".tmp-00000002-1-ab").write_bytes(b"half")
    claim = store.claim(3)
    store.clear()
    assert names(tmp_path) == []
    claim.release(remove=True)
    assert store.claim(2) is None
    assert store.claim_finish() is None
    assert names(tmp_path) == []
    store.clear()


def crashed_folder(tmp_path, faults, at):
    """A folder in which the process died at operation `at` of one write; whether it died at all."""
    fs = faults.FileSystem(tmp_path)
    store = store_of(tmp_path / "chunks", fs=fs)
    put(store, 0)
    fs.fault = faults.crash_at(fs.calls + at)
    with contextlib.suppress(faults.Crash):
        put(store, 1)
        return fs, False
    return fs, True


def test_a_crash_at_any_point_of_a_write_leaves_the_chunk_whole_or_missing(tmp_path, faults):
    at, ends = 0, False
    seen = set()
    while not ends:
        at += 1
        root = tmp_path / f"crash{at}"
        root.mkdir()
        fs, crashed = crashed_folder(root, faults, at)
        ends = not crashed
        places = [root / "chunks"]
        for mode in ("lost", "names", *("mixed",) * 5):
            places.append(fs.after_power_cut(root / f"cut-{len(places)}", mode, seed=len(places)) / "chunks")
        for folder in places:
            store = ChunkStore(folder, 4, "a")
            store.open()
            assert same(store.read(0), 0)  # stored before
            there = 1 not in store.missing()
            seen.add(there)
            if there:
                assert same(store.read(1), 1)
            assert there or crashed
            put(store, *store.missing())
            assert all(same(store.read(index), index) for index in range(4))
            assert not [name for name in names(folder) if name.startswith(".tmp")]
    assert at > 5
    assert seen == {True, False}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_at_any_point_is_one_line_and_costs_nothing_that_is_stored(tmp_path, faults, number):
    at = 0
    while True:
        at += 1
        root = tmp_path / str(at)
        root.mkdir()
        fs = faults.FileSystem(root)
        store = store_of(root / "chunks", fs=fs)
        put(store, 0)
        before = fs.calls
        fs.fault = faults.fail_at(before + at, number, lasting=True)
        told = None
        try:
            put(store, 1)
        except StorageError as error:
            told = str(error)
        if told is None:
            break
        assert "chunk 1" in told
        assert "bytes are free" in told
        fs.fault = lambda call, name: None
        assert same(store.read(0), 0)
        put(store, *store.missing())
        assert same(store.read(1), 1)
        assert not [name for name in names(root / "chunks") if name.startswith(".tmp")]
    assert at > 5
