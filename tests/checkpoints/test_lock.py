import errno
import json
import os
import signal
from dataclasses import asdict

import pytest

from smalti.checkpoints import RunLock
from smalti.errors import RunLockedError, StorageError
from smalti.storage.process import Process, is_dead


def left_behind(folder, **changes):
    """A lock file as a process leaves it that was killed."""
    holder = asdict(Process.current()) | {"since": "2026-01-01 00:00:00"} | changes
    (folder / ".lock").write_text(json.dumps(holder))


@pytest.mark.faults
def test_a_second_holder_is_told_who_the_first_is(tmp_path):
    with RunLock(tmp_path / "run"):
        with pytest.raises(RunLockedError, match=rf"process {os.getpid()} on .* since \d{{4}}-") as error:
            RunLock(tmp_path / "run").__enter__()
        assert error.value.exit_code == 73
        assert "\n" not in str(error.value)
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_a_child_that_outlives_a_killed_holder_does_not_hold_its_lock(tmp_path):
    reader, writer = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            signal.alarm(60)
            with RunLock(tmp_path):
                if not os.fork():
                    signal.alarm(60)  # of the parent's, a child has none
                    os.write(writer, str(os.getpid()).encode())
                signal.pause()
        finally:
            os._exit(1)
    child = int(os.read(reader, 20))
    try:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with RunLock(tmp_path):
            os.kill(child, 0)  # is still there
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_two_folders_are_two_locks(tmp_path):
    with RunLock(tmp_path / "a"), RunLock(tmp_path / "b"):
        pass


@pytest.mark.faults
@pytest.mark.parametrize(
    "changes", [{"pid": 2**31 - 1}, {"started": 1}, {"boot_id": "before"}, {"boot_id": "before", "pid": 1}]
)
def test_a_stale_lock_of_this_machine_is_taken_over(tmp_path, changes):
    left_behind(tmp_path, **changes)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.faults
def test_a_lock_left_by_another_machine_is_taken_only_on_request(tmp_path):
    left_behind(tmp_path, host="elsewhere", boot_id="another")
    with pytest.raises(RunLockedError, match=r"left locked by process .* on elsewhere .* --steal"):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path, steal=True):
        pass
    with RunLock(tmp_path):
        pass


@pytest.mark.faults
@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x00\x00"])
def test_a_lock_file_that_was_not_finished_is_no_obstacle(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be locked"):
        RunLock(tmp_path / "file" / "run").__enter__()


def test_a_full_disk_is_one_line_and_leaves_the_folder_free(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match=r"locked: No space left on device; [\d,]+ bytes are free: make"):
            RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_this_process_lives_and_one_that_never_was_does_not():
    me = Process.current()
    assert is_dead(me.token) is False
    assert is_dead(Process(2**31 - 1, me.host, me.boot_id, 1).token) is True
    assert is_dead(Process(me.pid, me.host, me.boot_id, me.started + 1).token) is True
    assert is_dead(Process(1, "elsewhere", "another", 1).token) is None
    assert is_dead("nonsense") is None
