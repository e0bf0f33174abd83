"""The benchmark of moments and neighbours, run small."""

import json
from pathlib import Path

import pytest

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
