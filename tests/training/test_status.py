"""Marks in a run folder: what each says, that there is one at most, and who may write it."""

import errno
import subprocess
from pathlib import Path

import pytest

from smalti import errors
from smalti.checkpoints import RunLock
from smalti.errors import (
    ConfigError,
    DataError,
    NumericError,
    PreemptedError,
    RunLockedError,
    SmaltiError,
    StorageError,
)
from smalti.storage.filesystem import LocalFileSystem
from smalti.training.status import (
    RunStatus,
    mark_failed,
    mark_finished,
    mark_preempted,
    mark_refused,
    mark_running,
    marked_failures,
    read_status,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_folder_without_a_mark_is_open_and_worth_another_start(tmp_path):
    assert read_status(tmp_path) == read_status(tmp_path / "missing") == RunStatus("open")
    assert read_status(tmp_path).retry


@pytest.mark.faults
def test_a_stop_says_its_step_and_signal_and_the_next_start_takes_it_away(tmp_path):
    mark_preempted(tmp_path, 120, "SIGTERM")
    found = read_status(tmp_path)
    assert (found.kind, found.retry) == ("preempted", True)
    assert (found.values["step"], found.values["signal"]) == ("120", "SIGTERM")
    assert found.values["time"].endswith("Z")
    mark_running(tmp_path)
    assert names(tmp_path) == []


def test_a_finished_run_needs_no_other_start(tmp_path):
    mark_finished(tmp_path, 500)
    assert (read_status(tmp_path).kind, read_status(tmp_path).retry) == ("finished", False)
    mark_running(tmp_path)
    assert read_status(tmp_path).kind == "open"


EVERY_ERROR = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SmaltiError)]


@pytest.mark.faults
@pytest.mark.parametrize("kind", EVERY_ERROR, ids=lambda kind: kind.__name__)
def test_an_error_says_its_exit_code_its_one_line_and_whether_to_try_again(tmp_path, kind):
    mark_failed(tmp_path, kind("first line\n  second: line"))
    found = read_status(tmp_path)
    assert found.kind == "failed"
    assert found.values["exit_code"] == str(kind.exit_code)
    assert found.values["message"] == "first line second: line"
    assert found.retry == (kind.exit_code not in (64, 65, 70, 73))


def test_a_shell_can_read_the_marks(tmp_path):
    mark_failed(tmp_path, ConfigError("batch_size must be at least 1, got 0"))
    script = 'grep -q "^retry: no$" "$1/FAILED" && sed -n "s/^exit_code: //p" "$1/FAILED"'
    done = subprocess.run(["sh", "-c", script, "sh", str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "64\n"


@pytest.mark.faults
def test_a_cause_stands_against_those_who_only_noticed(tmp_path):
    lost = SmaltiError("process 0 of 2 waited for another one that ended")
    mark_failed(tmp_path, lost)
    mark_failed(tmp_path, DataError("shard-3.tar is cut off"))
    assert read_status(tmp_path).values["exit_code"] == "65"
    mark_failed(tmp_path, lost)
    assert read_status(tmp_path).values["exit_code"] == "65"


def test_the_cause_of_an_earlier_start_says_nothing_of_a_later_one(tmp_path):
    lost = SmaltiError("process 0 of 2 waited for another one that ended")
    for later, exit_code in ((-1, "65"), (1, str(lost.exit_code))):
        mark_failed(tmp_path, DataError("shard-3.tar is cut off"))
        mark_failed(tmp_path, lost, since=(tmp_path / "FAILED").stat().st_mtime + later)
        assert read_status(tmp_path).values["exit_code"] == exit_code


def test_a_failure_inside_the_run_is_marked_and_passed_on(tmp_path):
    with pytest.raises(NumericError), marked_failures(tmp_path):
        raise NumericError("11 of the last 1000 steps")
    assert read_status(tmp_path).values["exit_code"] == "70"
    mark_running(tmp_path)
    mark_preempted(tmp_path, 3, "SIGINT")
    with pytest.raises(PreemptedError), marked_failures(tmp_path):
        raise PreemptedError("stopped")
    with pytest.raises(ZeroDivisionError), marked_failures(tmp_path):
        raise ZeroDivisionError
    assert names(tmp_path) == ["PREEMPTED"]


@pytest.mark.faults
def test_an_error_before_the_run_has_its_folder_is_marked_where_nobody_else_runs(tmp_path):
    mark_refused(tmp_path / "missing", ConfigError("steps must be at least 1"))
    assert names(tmp_path) == []
    mark_refused(tmp_path, RunLockedError("run folder is being written"))
    with RunLock(tmp_path):
        mark_refused(tmp_path, ConfigError("steps must be at least 1"))
    assert names(tmp_path) == []
    mark_refused(tmp_path, ConfigError("steps must be at least 1"))
    assert read_status(tmp_path).values["exit_code"] == "64"
    with RunLock(tmp_path):
        pass  # let go


def test_a_mark_is_written_whole_or_not_at_all(tmp_path):
    class Full(LocalFileSystem):
        def rename(self, source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    mark_preempted(tmp_path, 1, "SIGTERM")
    with pytest.raises(StorageError, match=r"writing the mark PREEMPTED .* No space left on device"):
        mark_preempted(tmp_path, 2, "SIGTERM", Full())
    assert names(tmp_path) == ["PREEMPTED"]
    assert read_status(tmp_path).values["step"] == "1"


def test_the_last_word_stands_alone(tmp_path):
    mark_finished(tmp_path, 500)
    mark_failed(tmp_path, ConfigError("steps must be at least 1"))
    assert names(tmp_path) == ["FAILED"]
    mark_preempted(tmp_path, 3, "SIGINT")
    assert names(tmp_path) == ["PREEMPTED"]
    mark_refused(tmp_path, ConfigError("steps must be at least 1"))
    assert names(tmp_path) == ["FAILED"]


@pytest.mark.faults
def test_a_refused_start_takes_no_finished_run_s_mark(tmp_path):
    mark_finished(tmp_path, 500)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    mark_refused(tmp_path, ConfigError("steps must be at least 1"))
    with pytest.raises(ConfigError), marked_failures(tmp_path, lambda: False):
        raise ConfigError("holds another run")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(NumericError), marked_failures(tmp_path, lambda: True):
        raise NumericError("11 of the last 1000 steps")
    assert names(tmp_path) == ["FAILED"]
    mark_running(tmp_path, begun=False)
    with pytest.raises(ConfigError), marked_failures(tmp_path, lambda: False):
        raise ConfigError("holds another run")
    assert read_status(tmp_path).values["exit_code"] == "64"
    mark_finished(tmp_path, 500)
    mark_running(tmp_path, begun=False)
    assert names(tmp_path) == ["FINISHED"]


@pytest.mark.faults
def test_a_full_disk_does_not_hide_why_a_run_failed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NumericError), marked_failures(tmp_path / "file"):
        raise NumericError("11 of the last 1000 steps")
