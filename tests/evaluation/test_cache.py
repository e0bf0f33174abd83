"""Kept features: the same numbers, never those of something else, and never a reason to stop."""

import torch

from smalti.evaluation.cache import FeatureCache
from smalti.evaluation.features import FeatureSet, NetworkIdentity

IDENTITY = NetworkIdentity("lite0", "abc", "96")
FOUND = FeatureSet({"pool": torch.arange(6.0).reshape(3, 2)})


def _cache(folder):
    notes = []
    return FeatureCache(folder, notes.append), notes


def test_what_was_kept_comes_back(tmp_path):
    cache, notes = _cache(tmp_path / "new")
    assert cache.load("images", IDENTITY, ["pool"]) is None
    cache.keep("images", IDENTITY, ["pool"], FOUND)
    assert "are kept in" in notes[0]
    assert torch.equal(cache.load("images", IDENTITY, ["pool"]).rows("pool"), FOUND.rows("pool"))


def test_other_images_another_network_or_other_kinds_are_something_else(tmp_path):
    cache, _ = _cache(tmp_path)
    cache.keep("images", IDENTITY, ["pool"], FOUND)
    assert cache.load("others", IDENTITY, ["pool"]) is None
    assert cache.load("images", NetworkIdentity("lite0", "abd", "96"), ["pool"]) is None
    assert cache.load("images", IDENTITY, ["pool", "logits"]) is None


def test_a_flipped_byte_is_noticed(tmp_path):
    cache, notes = _cache(tmp_path)
    cache.keep("images", IDENTITY, ["pool"], FOUND)
    path = next(tmp_path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert cache.load("images", IDENTITY, ["pool"]) is None
    assert "changed after it was written" in notes[-1]


def test_a_folder_that_cannot_be_written_is_a_note_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    cache, notes = _cache(tmp_path / "file" / "sub")
    cache.keep("images", IDENTITY, ["pool"], FOUND)
    assert "could not be kept" in notes[-1]
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]
