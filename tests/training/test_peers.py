"""Whom a process names when another one is missing, from the signs of life and notes that it can read."""

from types import SimpleNamespace

import pytest
import torch

from smalti.errors import SmaltiError
from smalti.training import peers as module
from smalti.training.peers import Peers
from smalti.world import World


class Notes(dict):
    """Of a store, what is asked here."""

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()


def blame(monkeypatch, notes, meanwhile):
    peers = Peers(World(0, 3))
    peers.step, peers._store = 6, Notes(notes)
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: peers._store.update(meanwhile)))
    return peers.blame()


SIGNS = {"sign/0": "6 40", "sign/1": "7 30", "sign/2": "5 30"}


def test_who_gives_no_sign_is_named_and_who_does_is_not(monkeypatch):
    said = blame(monkeypatch, SIGNS, {"sign/2": "5 33"})
    assert said == "process 0 of 3 stopped at step 6: process 1 was last heard of at step 7"


def test_a_cause_that_was_left_is_told_and_not_who_has_only_fallen_silent(monkeypatch):
    said = blame(monkeypatch, SIGNS | {"left/2": "shard-3.tar is cut off (at step 5)"}, {})
    assert said == "process 0 of 3 stopped at step 6: process 2 ended: shard-3.tar is cut off (at step 5)"


def test_where_all_give_signs_their_steps_are_told(monkeypatch):
    said = blame(monkeypatch, SIGNS, {"sign/1": "7 33", "sign/2": "5 33"})
    expected = "no other process is missing; process 1 is at step 7; process 2 is at step 5"
    assert said == f"process 0 of 3 stopped at step 6: {expected}"


class Gone:
    """A store whose keeper is dead."""

    def set(self, key, value):
        raise torch.distributed.DistNetworkError("Connection reset by peer")


class Slow:
    """A store whose keeper stands still."""

    def set(self, key, value):
        raise torch.distributed.DistStoreError("timed out")


@pytest.fixture
def ended(monkeypatch):
    """Codes that the process was ended with."""
    codes = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    monkeypatch.setattr(module, "_MUTE", 0.01)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return codes


def left_alone():
    peers = Peers(World(1, 2))
    peers.step, peers._keeper, peers._store = 6, 5, Gone()
    return peers


def test_a_training_that_does_not_notice_that_process_0_is_gone_is_ended_and_says_so(ended, capsys):
    left_alone()._beat()
    assert ended == [75]
    said = capsys.readouterr().err
    assert said.startswith(
        "smalti: process 1 of 2 stopped at step 6: process 0 is gone, and process 0 was last heard of"
    )
    assert said.endswith("the same command continues the run\n")


def test_a_training_that_has_noticed_or_is_over_says_so_itself(ended):
    peers = left_alone()
    with peers.watched():
        pass
    peers._beat()
    peers = left_alone()
    with pytest.raises(SmaltiError, match="a cut shard"), peers.watched():
        raise SmaltiError("a cut shard")
    peers._beat()
    assert ended == []


def test_a_store_that_is_only_slow_ends_nothing(ended):
    peers = left_alone()
    peers._store = Slow()
    peers._beat()
    assert ended == []


def test_who_loses_torchrun_which_keeps_the_store_trains_on(ended, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    left_alone()._beat()
    assert ended == []
