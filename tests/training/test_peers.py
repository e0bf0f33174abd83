"""Whom a process names when another one is missing, from the signs of life and notes that it can read."""

from types import SimpleNamespace

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
