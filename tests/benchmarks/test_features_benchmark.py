"""The benchmark of feature networks, run small."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_features_are_timed_beside_the_floor_of_their_products_and_the_resize_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.__main__ import main

    out = tmp_path / "lines.jsonl"
    arguments = ["--image-size", "32", "--batch", "1", "2", "--repeats", "1", "--out", str(out)]
    assert main(["features", *arguments]) == 0
    line, two = (json.loads(text) for text in out.read_text().splitlines())
    assert (line["batch"], two["batch"]) == (1, 2)
    assert two["images_per_second"] == pytest.approx(2 / two["seconds"])
    assert line["benchmark"] == "features"
    assert line["gmacs"] == pytest.approx(5.71, abs=0.05)
    floor = line["gmacs"] / line["gemm_gmacs_per_second"]
    assert line["floors"] == pytest.approx(line["seconds"] / floor)
    assert line["resize_images_per_second"] > line["images_per_second"] == pytest.approx(1 / line["seconds"])
    assert "x floor" in capsys.readouterr().out
