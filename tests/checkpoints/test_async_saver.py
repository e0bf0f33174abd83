"""Saving beside the training: what is stored is the state of the moment, and no failure stays unsaid."""

import threading
import time

import pytest
import torch

from smalti.checkpoints import AsyncSaver, CheckpointStore
from smalti.errors import NumericError, StorageError


def never(message):
    raise AssertionError(f"skipped: {message}")


class Gated:
    """A file system whose first write of each save waits until the gate is open."""

    def __init__(self, real):
        self.real, self.gate, self.waiting = real, threading.Event(), threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self.real, name)

    def create(self, path):
        self.waiting.set()
        assert self.gate.wait(60)
        return self.real.create(path)


@pytest.fixture
def gated(tmp_path, faults):
    fs = Gated(faults.FileSystem(tmp_path))
    yield fs
    fs.gate.set()


def test_what_is_stored_is_the_state_when_it_was_asked_for(tmp_path, faults, gated):
    store = CheckpointStore(tmp_path / "run", fs=gated)
    with AsyncSaver(store) as saver:
        tensors, state = faults.payload(1), {"value": 1, "list": [1]}
        gated.gate.clear()
        saver.save(1, tensors, state)
        assert gated.waiting.wait(60)
        assert saver.busy
        for group in tensors.values():
            for tensor in group.values():
                tensor.fill_(2)
        state["list"].append(2)
        gated.gate.set()
        saver.wait()
        assert not saver.busy
        assert 0 < saver.blocking_seconds < saver.seconds
        found = store.load_newest(never)
        assert (faults.value_of(found), found.state["list"]) == (1, [1])
        saver.save(2, tensors, {"value": 2}, score=0.25)
    found = store.load_newest(never)
    assert (faults.value_of(found), found.score) == (2, 0.25)


def test_what_changes_before_the_thread_has_begun_is_not_stored_either(tmp_path, faults, monkeypatch):
    store, begin = CheckpointStore(tmp_path / "run"), threading.Event()
    real = store.save
    monkeypatch.setattr(store, "save", lambda *args, **kwargs: begin.wait(60) and real(*args, **kwargs))
    with AsyncSaver(store) as saver:
        state = {"list": [1]}
        saver.save(1, faults.payload(1), state)
        state["list"].append(2)
        begin.set()
    assert store.load_newest(never).state["list"] == [1]


def test_a_second_save_waits_for_the_first_and_says_how_long(tmp_path, faults, gated):
    store = CheckpointStore(tmp_path / "run", fs=gated)
    with AsyncSaver(store) as saver:
        gated.gate.clear()
        saver.save(1, faults.payload(1), {"value": 1})
        assert gated.waiting.wait(60)
        real, waits = saver._join, threading.Event()
        saver._join = lambda: waits.set() or real()
        threading.Thread(target=lambda: (waits.wait(60), time.sleep(0.2), gated.gate.set())).start()
        saver.save(2, faults.payload(2), {"value": 2})
        assert store.steps()[0] == 1
        assert saver.blocking_seconds >= 0.15
    assert store.steps() == [1, 2]


def test_host_memory_is_used_again(tmp_path, faults):
    with AsyncSaver(CheckpointStore(tmp_path, fs=faults.QuickFileSystem())) as saver:
        saver.save(1, faults.payload(1), {"value": 1})
        saver.wait()
        first = {key: buffer.data_ptr() for key, buffer in saver._buffers.items()}
        saver.save(2, faults.payload(2) | {"more": {"a": torch.ones(3)}}, {"value": 2})
        saver.wait()
        second = {key: buffer.data_ptr() for key, buffer in saver._buffers.items()}
        assert first.items() <= second.items()
        assert len(second) == len(first) + 1
        saver.save(3, faults.payload(3), {"value": 3})
        assert saver._buffers.keys() == first.keys()
        saver.save(4, {"model": {name: t.double() for name, t in faults.payload(4)["model"].items()}}, {"value": 4})
    stored = CheckpointStore(tmp_path).load(4)
    assert {stored.dtype("model", name) for name in stored.names("model")} == {torch.float64}


@pytest.mark.faults
@pytest.mark.parametrize("ask", ["check", "wait", "save", "end"])
def test_a_failure_is_told_once_at_the_next_question(tmp_path, faults, ask):
    fs = faults.FileSystem(tmp_path)
    store = CheckpointStore(tmp_path / "run", fs=fs)
    saver = AsyncSaver(store)
    saver.save(1, faults.payload(1), {"value": 1})
    saver.wait()
    fs.calls = 0
    fs.fault = faults.fail_at(9, 28, lasting=True)
    saver.save(2, faults.payload(2), {"value": 2})
    while saver.busy:
        time.sleep(0.01)
    assert saver.failed
    questions = {
        "check": saver.check,
        "wait": saver.wait,
        "save": lambda: saver.save(3, faults.payload(3), {"value": 3}),
        "end": lambda: saver.__exit__(None, None, None),
    }
    with pytest.raises(StorageError, match="No space left"):
        questions[ask]()
    assert not saver.failed
    fs.fault = lambda call, name: None
    assert faults.value_of(store.load_newest(never)) == 1
    with saver:
        saver.check()
        saver.save(4, faults.payload(4), {"value": 4})
    assert faults.value_of(store.load_newest(never)) == 4


@pytest.mark.faults
def test_a_failure_at_the_end_does_not_hide_the_error_that_ended_the_training(tmp_path, faults):
    store = CheckpointStore(tmp_path)

    def train():
        with AsyncSaver(store) as saver:
            saver.save(1, {"model": {"a": torch.tensor([float("nan")])}}, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        train()
    assert any("not finite" in note for note in error.value.__notes__)
    with pytest.raises(NumericError), AsyncSaver(store) as saver:
        saver.save(1, {"model": {"a": torch.tensor([float("nan")])}}, {})
    assert store.steps() == []


@pytest.mark.faults
def test_a_process_killed_at_any_point_of_a_save_beside_the_training_keeps_the_one_before(tmp_path, faults):
    for k in [*range(1, 60, 3), 1000]:
        root = tmp_path / str(k)
        root.mkdir()
        fs = faults.FileSystem(root)
        with faults.dying_process():
            saver = AsyncSaver(CheckpointStore(root / "run", fs=fs, keep_last=1))
            saver.save(1, faults.payload(1), {"value": 1})
            saver.wait()
            fs.calls = 0
            fs.fault = faults.crash_at(k)
            saver.save(2, faults.payload(2), {"value": 2})
            saver._join()
        after = CheckpointStore(root / "run", keep_last=1, fs=faults.QuickFileSystem())
        expected = (1, 2) if k < 1000 else (2,)
        assert faults.value_of(after.load_newest(never)) in expected, f"call {k}"
        after.save(3, faults.payload(3), {"value": 3})
        assert sorted(p.name for p in (root / "run").iterdir()) == ["LATEST", "step-0000000003"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_copy_is_pinned_and_of_the_moment(tmp_path):
    store = CheckpointStore(tmp_path)
    weights = torch.zeros(64 << 20, device="cuda")
    with AsyncSaver(store) as saver:
        for step in (1, 2):
            weights.fill_(step)
            saver.save(step, {"model": {"w": weights}}, {})
            weights.fill_(-1)  # enqueued at once, behind the copy
            assert all(buffer.is_pinned() for buffer in saver._buffers.values())
            saver.wait()
            assert bool((store.load(step).tensor("model", "w") == step).all())
        assert 0 < saver.blocking_seconds < saver.seconds / 2
