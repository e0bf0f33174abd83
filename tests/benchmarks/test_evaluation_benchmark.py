"""The benchmark of moments and neighbours, run small."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_each_work_is_timed_beside_its_floor_with_the_peak_of_its_own_process(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.__main__ import main

    out = tmp_path / "lines.jsonl"
    arguments = ["moments", "suite-intervals", "--count", "200", "--reference-count", "100", "--width", "64"]
    assert main(["evaluation", *arguments, "--repeats", "1", "--out", str(out)]) == 0
    moments, suite = (json.loads(text) for text in out.read_text().splitlines())
    assert moments["gmacs"] == pytest.approx(200 * 64**2 / 1e9)
    assert suite["gmacs"] == pytest.approx((200**2 + 100**2 + 200 * 100) * 64 / 1e9)
    for line in (moments, suite):
        assert line["floors"] == pytest.approx(line["seconds"] * line["gemm_gmacs_per_second"] / line["gmacs"])
        assert line["peak_bytes"] > 50 * 2**20 > line["feature_bytes"]
    assert 0 < suite["values"]["precision"] <= 1
    assert "peak GiB" in capsys.readouterr().out


def test_a_stream_has_time_and_peak_of_every_phase_and_fails_above_its_limit(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import evaluation
    from benchmarks.__main__ import main
    from benchmarks.evaluation_stream import images

    assert torch.cat(list(images(130, 0))).shape == (130, 3, 8, 8)
    out = tmp_path / "lines.jsonl"
    sizes = ["--count", "60", "--reference-count", "40", "--out", str(out)]
    assert main(["evaluation", "stream-neighbours", *sizes]) == 0
    (line,) = (json.loads(text) for text in out.read_text().splitlines())
    phases = ["features of real images", "features of our images", "fid", "sfid", "inception_score"]
    assert list(line["phases"]) == [*phases, "precision and recall", "floor"]
    assert line["peak_bytes"] == max(phase["peak_bytes"] for phase in line["phases"].values()) > 50 * 2**20
    assert line["seconds"] == pytest.approx(sum(phase["seconds"] for phase in line["phases"].values()))
    assert line["feature_bytes"] == 4 * (60 * (2048 + 2023 + 1008) + 40 * (2048 + 2023))
    assert line["values"].keys() == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert all(error > 0 for error in line["standard_errors"].values())
    assert "floors" not in line
    assert "above the limit" not in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "_in_a_child", lambda name, options: line | {"limit_bytes": 2**20})
    assert main(["evaluation", "stream-neighbours", *sizes]) == 1
    assert "stream-neighbours: above the limit of 0.000976562 GiB" in capsys.readouterr().out
