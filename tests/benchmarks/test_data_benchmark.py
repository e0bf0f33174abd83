"""The benchmark of data, run small."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _import_from_the_root(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_way_is_measured_beside_plain_pillow(tmp_path, capsys):
    from benchmarks.__main__ import main

    out = tmp_path / "data.jsonl"
    small = ["--count", "6", "--image-size", "32", "--batch", "4", "--repeats", "2"]
    assert main(["data", *small, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["work"] for line in lines] == ["pillow", "folder", "shards", "workers"]
    assert lines[0]["of_pillow"] == 1
    for line in lines:
        assert line["samples_per_second"] == pytest.approx(6 / line["seconds"])
        assert line["benchmark"] == "data"
    assert "x pillow" in capsys.readouterr().out
    assert main(["data", "latents"]) == 64
