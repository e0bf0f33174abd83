"""The benchmark of what training does beside the network, run small."""

import json
from pathlib import Path

import pytest

from smalti.ops.adamw_ema import c

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--networks", "demo", "--override", "depth=1", "hidden_size=32", "num_heads=2", "--batch-size", "2"]
needs_c = pytest.mark.skipif(bool(c.unavailable()), reason=c.unavailable())


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`run(*arguments)`: exit code, lines by work, what was printed."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import overhead
    from benchmarks.__main__ import main

    monkeypatch.setattr(overhead, "SAMPLE_SECONDS", 0.0)

    def benchmark(*arguments):
        out = tmp_path / "lines.jsonl"
        code = main(["overhead", *arguments, *TINY, "--repeats", "1", "--folder", str(tmp_path), "--out", str(out)])
        lines = {line["work"]: line for line in map(json.loads, out.read_text().splitlines())}
        return code, lines, capsys.readouterr().out

    return benchmark


@needs_c
def test_every_work_has_its_share_of_the_step(run):
    code, lines, text = run()
    assert code == 0
    assert set(lines) == {"data", "data ahead", "update", "log", "save", "save beside"}
    for line in lines.values():
        assert line["share"] == pytest.approx(line["seconds"] / line["of_seconds"])
        assert line["seconds"] > 0
        assert line["benchmark"] == "overhead"
    update = lines["update"]
    assert update["refused"] == ""
    assert update["floors"] == pytest.approx(update["seconds"] / update["floor_seconds"])
    assert update["two_calls_floors"] > 0
    assert (lines["data"]["workers"], lines["data ahead"]["workers"]) == (0, 1)
    assert lines["log"]["share"] < 0.1
    save = lines["save"]
    # Network, average and two moments in float32, and little beside them.
    assert 15 * save["parameters"] < save["bytes"] < 16 * save["parameters"] + 200_000
    assert save["of_seconds"] > save["checkpoint_every"] * lines["log"]["of_seconds"] / 100
    assert lines["save beside"]["total_seconds"] > 0
    assert "% of the step" in text


@needs_c
def test_the_yardstick_changes_nothing_and_a_missed_bar_fails_only_a_check(run, monkeypatch):
    from benchmarks import overhead

    calls = []
    single_pass = overhead._single_pass

    def watched(state, gradients):
        loop = single_pass(state, gradients)
        before = [p.detach().clone() for p in (*state.model.parameters(), *state.ema.model.parameters())]
        loop()
        after = [*state.model.parameters(), *state.ema.model.parameters()]
        calls.append(all(x.equal(y) for x, y in zip(before, after, strict=True)))
        return loop

    monkeypatch.setattr(overhead, "_single_pass", watched)
    monkeypatch.setattr(overhead, "BAR", 1e-3)
    code, lines, text = run("update")
    assert (code, set(lines), calls) == (0, {"update"}, [True])
    assert "floors, above 0.001" in text
    assert run("update", "--check")[0] == 1
    monkeypatch.setattr(overhead, "BAR", 1e9)
    assert run("update", "--check")[0] == 0


def test_unknown_work_is_named(run, capsys):
    with pytest.raises(SystemExit) as left:
        run("datta")
    assert left.value.code == 2
    assert "no work datta; there is data, update, log, checkpoint" in capsys.readouterr().err
