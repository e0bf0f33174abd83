"""Claims of chunks between processes: what is let go is free at once, and what is made is not made again."""

import errno
import os

import pytest
import torch

from smalti.errors import StorageError
from smalti.storage import chunks as module
from smalti.storage.chunks import ChunkStore

CONTENT = {"images": torch.arange(6, dtype=torch.uint8)}


def store_of(folder):
    store = ChunkStore(folder, 4, "a")
    store.open()
    return store


@pytest.fixture
def forked():
    """Forks that live on until the test is over; each call returns when the new one runs."""
    goes_on, over = os.pipe()
    children = []

    def fork():
        begun, begins = os.pipe()
        children.append(os.fork())
        if children[-1] == 0:
            os.close(over)
            os.write(begins, b"1")
            os.read(goes_on, 1)
            os._exit(0)
        os.read(begun, 1)
        os.close(begun), os.close(begins)

    yield fork
    os.close(over), os.close(goes_on)
    for child in children:
        os.waitpid(child, 0)


def test_a_forked_child_holds_no_claim_of_a_parent_that_ended(tmp_path, forked):
    claim = store_of(tmp_path).claim(0)
    forked()
    claim.forget()  # as the end of a process does: closed, and no word of the lock
    with store_of(tmp_path).claim(0) as again:
        assert again is not None


def test_a_claim_is_free_when_it_is_let_go_also_where_a_child_has_not_come_to_forget_it(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(module, "_forget", lambda reference: None)
    store = store_of(tmp_path)
    claim = store.claim(0)
    forked()
    claim.release()
    with store_of(tmp_path).claim(0) as again:
        assert again is not None


def test_a_chunk_that_its_maker_finished_between_two_looks_is_not_claimed_again(tmp_path, monkeypatch):
    store, take = store_of(tmp_path), ChunkStore._take

    def late(self, name, what):
        other = store_of(tmp_path)
        with take(other, name, what) as claim:
            other.write(0, CONTENT)
            claim.release(remove=True)
        return take(self, name, what)

    monkeypatch.setattr(ChunkStore, "_take", late)
    assert store.claim(0) is None
    assert [path.name for path in tmp_path.iterdir()] == ["chunk-00000000.safetensors"]


def test_what_is_asked_for_a_moment_only_leaves_no_claim_behind(tmp_path):
    store = store_of(tmp_path)
    store.claim(0).release()
    assert list(tmp_path.iterdir())
    assert not store.in_use()
    assert list(tmp_path.iterdir()) == []
    store.write(1, CONTENT)
    assert store.claim(1) is None
    assert [path.name for path in tmp_path.iterdir()] == ["chunk-00000001.safetensors"]


def test_while_others_work_the_looks_get_rarer_up_to_one_a_second(tmp_path, monkeypatch):
    store, pauses = store_of(tmp_path), []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    with store_of(tmp_path).claim(0):
        assert list(store.work([0], over=lambda: len(pauses) >= 9)) == []
    assert pauses == pytest.approx([0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EIO])
def test_a_folder_that_is_in_use_again_stays_and_another_error_is_told(tmp_path, monkeypatch, number):
    store = store_of(tmp_path / "chunks")

    def refused(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store._fs, "remove_folder", refused)
    if number == errno.ENOTEMPTY:
        store.clear()
    else:
        with pytest.raises(StorageError, match="removing the chunks"):
            store.clear()
