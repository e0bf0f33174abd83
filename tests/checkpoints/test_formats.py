"""Every format that was ever released stays readable, to the bit."""

import shutil
from pathlib import Path

import pytest
import torch

from smalti.checkpoints import CheckpointStore
from smalti.checkpoints.layout import VERSION

STORED = Path(__file__).parents[1] / "data" / "checkpoints"


def never(message):
    raise AssertionError(f"skipped: {message}")


def ramp(dtype, *shape):
    return torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)


EXPECTED = {
    "model": {"w": ramp(torch.float32, 3, 2), "half": ramp(torch.bfloat16, 4), "empty": torch.zeros(0, 3)},
    "ema": {"w": ramp(torch.float32, 3, 2) + 0.5},
    "optimizer": {"w.exp_avg": -ramp(torch.float32, 3, 2), "w.step": torch.tensor(7.0), "count": torch.tensor(7)},
}


@pytest.mark.faults
@pytest.mark.parametrize("version", sorted(path.name for path in STORED.glob("version-*")))
def test_a_stored_format_reads_as_it_was_written(version):
    found = CheckpointStore(STORED / version).load_newest(never)
    assert (found.step, found.state) == (7, {"step": 7, "skipped": [3], "text": "ü"})
    assert {group: sorted(found.names(group)) for group in found.groups()} == {
        g: sorted(m) for g, m in EXPECTED.items()
    }
    for group, members in EXPECTED.items():
        for name, tensor in members.items():
            back = found.tensor(group, name)
            assert (back.dtype, found.dtype(group, name), found.shape(group, name)) == (
                tensor.dtype,
                tensor.dtype,
                tuple(tensor.shape),
            )
            assert torch.equal(back, tensor)
            if tensor.ndim:
                assert torch.equal(found.rows(group, name, 0, len(tensor) // 2), tensor[: len(tensor) // 2])


@pytest.mark.faults
def test_the_newest_format_is_among_the_stored_ones_and_tells_whose_it_is():
    assert {path.name for path in STORED.glob("version-*")} == {f"version-{k}" for k in range(1, VERSION + 1)}
    found = CheckpointStore(STORED / "version-2").load(7)
    assert (found.run_id, found.score) == ("a run", 0.5)
    assert {part.file for part in found._index["model"]["w"].slices} == {
        "model.rank-0000.safetensors",
        "model.rank-0001.safetensors",
    }


def test_version_1_has_no_run_and_a_run_with_a_name_goes_on_from_it(tmp_path):
    shutil.copytree(STORED / "version-1", tmp_path / "run")
    store = CheckpointStore(tmp_path / "run", keep_last=1, run_id="a")
    found = store.load_newest(never)
    assert (found.run_id, found.score) == (None, None)
    store.save(8, found.tensors, found.state)
    assert store.steps() == [8]
    assert store.load(8).run_id == "a"
