"""Clocks that jump: what a run computes, and which checkpoint it continues from, depend on steps and never on time."""

import datetime
import os
import random
import time

import pytest
import torch
from tiny_runs import tiny_config, write_set

from smalti.checkpoints import CheckpointStore, RunLock
from smalti.training.log import read_log
from smalti.workflows.train import train

pytestmark = pytest.mark.faults


@pytest.fixture
def broken_clock(monkeypatch):
    """The time of day jumps by years in either direction, at every look; the clock that only counts is left alone."""
    rng, real = random.Random(0), time.time

    def jumping():
        return real() + rng.uniform(-(10**9), 10**9)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromtimestamp(jumping(), tz)

    for name in ("gmtime", "localtime"):
        convert = getattr(time, name)
        monkeypatch.setattr(time, name, lambda *at, convert=convert: convert(*at or (jumping(),)))
    strftime = time.strftime
    monkeypatch.setattr(time, "strftime", lambda form, *at: strftime(form, *(at or (time.localtime(),))))
    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    monkeypatch.setattr(datetime, "datetime", Jumping)
    assert abs(time.time() - real()) > 1


def shuffle_times(folder, rng):
    """Files from the past and the future, none in the order they were written in."""
    for path in folder.rglob("*"):
        moment = rng.uniform(1, 4e9)
        os.utime(path, (moment, moment))


def bits(out):
    found = CheckpointStore(out / "checkpoints").load_newest(pytest.fail)
    members = {f"{group}.{name}": t for group, part in found.tensors.items() for name, t in part.items()}
    stored = {name: t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in members.items()}
    return stored, found.step, found.state, (out / "model" / "model.safetensors").read_bytes()


def lines(out):
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_log(out)]


def test_a_run_under_a_broken_clock_has_the_same_bits_and_the_same_log(tmp_path, request):
    data = write_set(tmp_path / "set")
    train(tiny_config(tmp_path / "right", data, steps=6))
    request.getfixturevalue("broken_clock")
    train(tiny_config(tmp_path / "wrong", data, steps=4))
    shuffle_times(tmp_path / "wrong", random.Random(1))
    assert CheckpointStore(tmp_path / "wrong" / "checkpoints").load_newest(pytest.fail).step == 4
    for out in ("again", "wrong"):
        train(tiny_config(tmp_path / out, data, steps=6))
        shuffle_times(tmp_path / out, random.Random(2))
    assert bits(tmp_path / "again") == bits(tmp_path / "right")
    assert lines(tmp_path / "again") == lines(tmp_path / "right")
    assert all(line.get("images_per_second", 1) > 0 for line in read_log(tmp_path / "again"))
    assert CheckpointStore(tmp_path / "wrong" / "checkpoints").steps() == [4, 6]


def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_the_files_say(tmp_path):
    store, rng = CheckpointStore(tmp_path, keep_last=3), random.Random(3)
    for step in (1, 2, 3):
        store.save(step, {"model": {"w": torch.full((2,), float(step))}}, {})
    for _ in range(20):
        shuffle_times(tmp_path, rng)
        assert store.load_newest(pytest.fail).step == 3
    store.save(4, {"model": {"w": torch.ones(2)}}, {})
    assert store.steps() == [2, 3, 4]


def test_a_lock_is_held_and_let_go_whatever_the_time(tmp_path, broken_clock):
    for _ in range(3):
        with RunLock(tmp_path):
            pass
