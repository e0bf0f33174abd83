"""A set of samples made on CUDA: the same bytes by one process, by two in turn and by two at once."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="sets of samples show their progress with the package rich, which is not here")

from tiny_models import write_tiny_model

from smalti.sampling import SamplingConfig
from smalti.workflows.sample_request import SampleSettings
from smalti.workflows.sample_set import sample_set

ROOT = Path(__file__).resolve().parents[2]
ONE_OF_TWO = """
import sys
from pathlib import Path
from smalti.sampling import SamplingConfig
from smalti.workflows.sample_request import SampleSettings
from smalti.workflows.sample_set import sample_set
sample_set(SampleSettings(
    model=Path(sys.argv[1]), out=Path(sys.argv[2]), sampling=SamplingConfig(num_inference_steps=4, guidance_scale=2.0),
    seeds="0-21", micro_batch=2, chunk_size=4, device=sys.argv[3], save=("png", "npz"), threads=1,
))
"""


@pytest.fixture
def settings(tmp_path, device, monkeypatch):
    """22 images in six chunks of four, the last of two."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return SampleSettings(
        model=write_tiny_model(tmp_path / "model"),
        out=tmp_path / "alone",
        sampling=SamplingConfig(num_inference_steps=4, guidance_scale=2.0),
        seeds="0-21",
        micro_batch=2,
        chunk_size=4,
        device=str(device),
        save=("png", "npz"),
        threads=1,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_chunks_made_by_ranks_in_any_order_give_the_bytes_of_one_process(settings, tmp_path, monkeypatch):
    sample_set(settings)
    whole = contents(settings.out)
    images = [data for name, data in whole.items() if name.endswith(".png")]
    assert len(set(images)) == len(images) > 22  # the grid too
    shared = replace(settings, out=tmp_path / "shared")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, chunks in ((1, "4:6"), (0, "1:3"), (1, "0:1"), (0, "")):
        monkeypatch.setenv("RANK", str(rank))
        sample_set(replace(shared, chunks=chunks))
    assert contents(shared.out) == whole


def test_two_processes_at_once_give_the_bytes_of_one(settings, tmp_path, device):
    sample_set(settings)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-c", ONE_OF_TWO, str(settings.model), str(tmp_path / "shared"), str(device)]
    both = [
        subprocess.Popen(
            words,
            env=os.environ | {"PYTHONPATH": paths, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert contents(tmp_path / "shared") == contents(settings.out)
