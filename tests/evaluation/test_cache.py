"""Kept features: the same numbers, never those of something else, and never a reason to stop."""

import torch

from smalti.evaluation.cache import cached_features
from smalti.evaluation.features import FeatureSet, NetworkIdentity

IDENTITY = NetworkIdentity("lite0", "abc", "96")


def _keep(folder, made, *, images="images", identity=IDENTITY, value=1.0):
    def make():
        made.append(images)
        return FeatureSet({"pool": torch.full((3, 2), value)})

    notes = []
    return cached_features(folder, images, identity, ["pool"], make, notes.append), notes


def test_the_second_time_nothing_is_made(tmp_path):
    made = []
    first, notes = _keep(tmp_path / "new", made)
    second, _ = _keep(tmp_path / "new", made, value=2.0)
    assert made == ["images"]
    assert "are kept in" in notes[0]
    assert torch.equal(first.rows("pool"), second.rows("pool"))


def test_other_images_or_another_network_are_something_else(tmp_path):
    made = []
    _keep(tmp_path, made)
    _keep(tmp_path, made, images="others")
    _keep(tmp_path, made, identity=NetworkIdentity("lite0", "abd", "96"))
    assert len(made) == 3


def test_a_flipped_byte_is_noticed_and_made_anew(tmp_path):
    made = []
    _keep(tmp_path, made)
    path = next(tmp_path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found, notes = _keep(tmp_path, made)
    assert len(made) == 2
    assert "changed after it was written" in notes[0]
    assert torch.equal(found.rows("pool"), torch.ones(3, 2))


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path):
    (tmp_path / "file").write_text("")
    found, notes = _keep(tmp_path / "file" / "sub", [])
    assert found.count == 3
    assert "could not be kept" in notes[-1]
