import contextlib
import errno
import importlib.util
import json
import os
import random
import signal
import time

import pytest

from smalti.errors import StorageError
from smalti.training.log import RunLog, read_log, tensorboard_installed


def write(folder, steps, *, start=-1, tensorboard=False):
    log = RunLog(folder, start, tensorboard=tensorboard)
    for step in steps:
        log.write("train", step, loss=1 / step, skipped=False)
    log.close()


def steps(folder):
    return [line["step"] for line in read_log(folder)]


def test_every_event_is_one_line_of_json(tmp_path):
    write(tmp_path, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [
        {"event": "train", "step": 1, "loss": 1.0, "skipped": False},
        {"event": "train", "step": 2, "loss": 0.5, "skipped": False},
    ]
    assert read_log(tmp_path) == lines


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path, -1, tensorboard=False)
    log.write("train", 1, loss=1.0)
    assert steps(tmp_path) == [1]
    log.close()


def test_a_run_without_log_reads_as_empty(tmp_path):
    assert read_log(tmp_path) == []


@pytest.mark.faults
@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_last_line_torn_by_a_kill_is_left_out_and_then_repaired(tmp_path, cut):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = [1, 2] if cut > 1 else [1, 2, 3]  # without its line break the last line is still whole
    assert steps(tmp_path) == kept
    write(tmp_path, [3 if cut > 1 else 4], start=kept[-1])
    assert steps(tmp_path) == [*kept, kept[-1] + 1]
    assert path.read_text().count("\n") == len(kept) + 1
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == steps(tmp_path)


@pytest.mark.faults
def test_lines_after_the_step_to_continue_from_are_dropped(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, [4, 5], start=3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_fresh_start_keeps_nothing_not_even_step_0(tmp_path):
    log = RunLog(tmp_path, -1, tensorboard=False)
    log.write("baseline", 0, constant=1.0)
    log.close()
    RunLog(tmp_path, 0, tensorboard=False).close()
    assert steps(tmp_path) == [0]
    RunLog(tmp_path, -1, tensorboard=False).close()
    assert steps(tmp_path) == []


@pytest.mark.faults
@pytest.mark.parametrize(
    "spoiled", [b"\xff\xfe\x00", b"\x00" * 40, b"[1, 2]", b"7", b'{"event": "train"}', b'{"step": "3"}']
)
def test_what_a_disk_made_of_a_line_is_left_out_and_then_repaired(tmp_path, spoiled):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], spoiled, *lines[2:]]))
    assert steps(tmp_path) == [1, 3]
    write(tmp_path, [4], start=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4]


def log_for_ever(folder, pipe):
    """As a run does: go on at the newest checkpoint, here some steps before the last line."""
    have = steps(folder)
    step = max(0, (have[-1] if have else 0) - random.Random(len(have)).randint(0, 5))
    os.write(pipe, b"1")
    log = RunLog(folder, step if have else -1, tensorboard=False)
    for later in range(step + 1, 10**9):
        log.write("train", later, loss=0.5, text="x" * 300)


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12: the child only writes and dies
def test_a_log_whose_writer_is_killed_again_and_again_has_rising_steps_and_no_gap(tmp_path, how_often):
    kills, rng, grown = how_often(30, 200), random.Random(0), 0
    for _ in range(kills):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                log_for_ever(tmp_path, writer)
            os._exit(1)
        os.close(writer)
        assert os.read(reader, 1), "the writer has failed"
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        os.close(reader)
        found = steps(tmp_path)
        assert found == list(range(1, len(found) + 1))
        grown += bool(found)
    assert grown > kills / 2
    write(tmp_path, [len(found) + 1], start=len(found))
    assert steps(tmp_path) == list(range(1, len(found) + 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl"]


@pytest.mark.faults
@pytest.mark.parametrize("fails", ["write", "rename", "fsync"])
def test_a_disk_that_fills_up_while_the_log_is_repaired_costs_no_line(tmp_path, monkeypatch, fails):
    write(tmp_path, [1, 2, 3])
    before = (tmp_path / "log.jsonl").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(StorageError, match="No space left on device"):
            RunLog(tmp_path, 2, tensorboard=False)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_line_costs_a_step_less_than_a_millisecond(tmp_path):
    """Ten to thirty microseconds where nothing else runs; the best of ten, because something always does."""
    log, best = RunLog(tmp_path, -1, tensorboard=False), 1.0
    for block in range(10):
        begin = time.perf_counter()
        for k in range(100):
            step = 100 * block + k + 1
            log.write("train", step, loss=0.1, grad_norm=0.2, learning_rate=1e-4, skipped=False, images_per_second=9.0)
        best = min(best, (time.perf_counter() - begin) / 100)
    log.close()
    assert best < 1e-3


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"log\.jsonl cannot be written") as caught:
        RunLog(tmp_path / "file", -1, tensorboard=False)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_a_full_disk_is_one_line(tmp_path):
    log = RunLog(tmp_path, -1, tensorboard=False)
    log._file.close()
    log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(StorageError, match="No space left on device; what was stored before is untouched"):
        log.write("train", 1, loss=1.0)
    with pytest.raises(StorageError, match="No space left on device"):
        log.close()  # what could not be written is tried again


@pytest.mark.faults
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_disk_that_is_full_for_tensorboard_alone_is_one_line(tmp_path, monkeypatch, capfd, when):
    """Its own thread would print a traceback."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "at the start":
        monkeypatch.setattr(RecordWriter, "write", full)
        with pytest.raises(StorageError, match=r"tensorboard cannot be written: No space left") as caught:
            RunLog(tmp_path, -1, tensorboard=True)
    else:
        log = RunLog(tmp_path, -1, tensorboard=True)
        monkeypatch.setattr(RecordWriter, "write", full)
        with pytest.raises(StorageError, match=r"tensorboard cannot be written: No space left") as caught:  # noqa: PT012
            log.write("train", 1, loss=1.0)
            log.close()
        assert steps(tmp_path) == [1]
    assert "bytes are free" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_tensorboard_could_not_write_is_told_while_the_steps_go_on(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path, -1, tensorboard=True)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(log._board, "add_scalar", full)  # as it raises what its thread has failed with
        with pytest.raises(StorageError, match=r"tensorboard cannot be written: No space left"):
            log.write("train", 1, loss=1.0)
    log.close()
    assert steps(tmp_path) == [1]


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    assert tensorboard_installed()
    write(tmp_path, [1, 2], tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/skipped"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_after_a_restart_tensorboard_shows_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    write(tmp_path, [1, 2, 3], tensorboard=True)
    begun = time.time()  # TensorBoard orders its files by the second they were begun in
    while int(time.time()) == int(begun):
        time.sleep(0.01)
    write(tmp_path, [3, 4], start=2, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_without_tensorboard_the_json_log_stands_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not tensorboard_installed()
    write(tmp_path, [1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl"]
