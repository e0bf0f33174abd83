"""The benchmark programs, run small: what they write, what they refuse to time, what they say to wrong names."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalti.nn.mixers import MIXERS
from smalti.ops import OPS, attention

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"benchmark", "date", "device", "device_type", "threads", "torch", "python", "smalti", "commit", "tree"}
TINY = ["--override", "depth=1", "hidden_size=32", "num_heads=2", "sample_size=16"]


@pytest.fixture(autouse=True)
def _import_from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def run(tmp_path, capsys):
    """`run(*arguments)`: exit code, lines written to the file, what was printed, what was complained."""

    def benchmark(*arguments):
        from benchmarks.__main__ import main

        out = tmp_path / "deeper" / "results.jsonl"
        code = main([*arguments, "--out", str(out)] if arguments else [])
        captured = capsys.readouterr()
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return code, lines, captured.out, captured.err

    return benchmark


def test_model_measures_forward_and_training_in_both_precisions(run):
    code, lines, text, _ = run(
        "model", "DiT-S/8", *TINY, "--batch", "2", "--precision", "fp32", "bf16", "--repeats", "1"
    )
    assert code == 0
    assert [line["precision"] for line in lines] == ["fp32", "bf16"]
    for line in lines:
        assert line.keys() >= HEAD
        assert line["benchmark"] == "model"
        assert line["torch"] == torch.__version__
        assert sum(line["gmacs_by_part"].values()) == pytest.approx(line["gmacs"])
        for what, forwards in (("forward", 1), ("training", 3)):
            rate = line[f"{what}_fp32_gemm_gmacs_per_second"]
            assert line["mode"] == "eager"
            floor = forwards * line["gmacs"] * line["batch"] / rate
            assert line[f"{what}_fp32_floors"] == pytest.approx(line[f"{what}_seconds"] / floor)
            assert line[f"{what}_fp32_floors"] > 0.1
        assert line["training_seconds"] > line["forward_seconds"]
    assert lines[1]["forward_floors"] > 0
    printed = text.splitlines()
    assert [json.loads(line) for line in printed[:2]] == lines
    assert "forward ms" in printed[3]
    assert printed[5].split()[0] == "DiT-S/8"


def test_model_counts_without_timing_and_appends(run):
    run("model", "dit-s-2", "--count")
    code, lines, text, _ = run("model", "dit-xl-2", "--count")
    assert code == 0
    assert [(line["preset"], line["parameters"]) for line in lines] == [
        ("dit-s-2", 32_963_360),
        ("dit-xl-2", 675_129_632),
    ]
    assert "118.621" in text
    assert "ms" not in text.splitlines()[-3]


def test_the_training_step_is_that_of_the_training_loop():
    from smalti.presets import parse_overrides, preset_config
    from smalti.workflows.timed import TimedNetwork

    config = preset_config("dit-s-8", **parse_overrides(tuple(TINY[1:])))
    subject = TimedNetwork(config, 2, "fp32", torch.device("cpu"))
    reports = [subject.training_step() for _ in range(3)]
    assert [report.step for report in reports] == [1, 2, 3]
    assert reports[2].loss < reports[0].loss  # always the same batch
    assert subject.forward().abs().min() > 0


def test_model_times_every_backbone_by_default_and_a_step_at_the_largest_batch_only(run, monkeypatch):
    from benchmarks import model

    monkeypatch.setattr(model, "SMALL", ("dit-s-8", "dit-s-4"))
    code, lines, text, _ = run(
        "model", *TINY, "--precision", "bf16-weights", "fp32", "--batch", "1", "2", "--repeats", "1"
    )
    assert code == 0
    assert {line["preset"] for line in lines} == {"dit-s-8", "dit-s-4"}
    trained = [(line["precision"], line["batch"]) for line in lines if "training_seconds" in line]
    assert trained == [("fp32", 2)] * 2
    assert "bf16-weights" in text


@pytest.mark.long
def test_model_times_a_compiled_and_a_frozen_forward():
    """In a process of its own: importing the compiler makes torch warn about itself."""
    arguments = [
        "dit-s-8",
        *TINY,
        "--batch",
        "1",
        "--mode",
        "compiled",
        "frozen",
        "--only",
        "forward",
        "--repeats",
        "1",
    ]
    command = [sys.executable, "-m", "benchmarks", "model", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["mode"] for line in lines] == ["compiled", "frozen"]
    assert all(line["forward_seconds"] > 0 for line in lines)


def test_model_says_why_there_is_nothing_to_time(run):
    code, lines, text, _ = run("model", "dit-s-8", *TINY, "--mode", "frozen", "--only", "training")
    assert (code, lines) == (0, [])
    assert "nothing to time: frozen weights cannot be trained" in text


def test_the_default_presets_are_one_of_each_backbone():
    from benchmarks.model import SMALL
    from smalti.models import BACKBONES
    from smalti.presets import PRESETS

    assert sorted(PRESETS[name].config.kind for name in SMALL) == sorted(BACKBONES)


def test_mixers_times_every_mixer_beside_the_fused_kernel(run):
    code, lines, text, _ = run("mixers", "--tokens", "16", "64", "--hidden-size", "64", "--repeats", "1")
    assert code == 0
    for tokens in (16, 64):
        rows = {(line["mixer"], line["linear_layers"]): line for line in lines if line["tokens"] == tokens}
        assert set(rows) == {("sdpa", False), *((kind, whole) for kind in MIXERS for whole in (True, False))}
        sdpa = rows["sdpa", False]
        for line in rows.values():
            assert line["times_sdpa"] == pytest.approx(sdpa["seconds"] / line["seconds"])
    assert "times faster than sdpa" in text


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_without_linear_layers_does_all_the_rest(kind):
    from benchmarks.mixers import without_linear_layers
    from smalti.nn.layers import Grid
    from smalti.nn.mixers import build_mixer
    from smalti.presets import preset_config
    from smalti.presets.swap import swap_mixer

    mixer = build_mixer(swap_mixer(preset_config("dit-s-2", hidden_size=64, num_heads=2), kind).mixer, 64)
    bare, x = without_linear_layers(mixer), torch.randn(2, 16, 64)
    with torch.no_grad():
        assert torch.equal(bare(x, Grid(4, 4)), mixer(x, Grid(4, 4)))
    assert not any(isinstance(module, torch.nn.Linear) for module in bare.modules())
    assert any(isinstance(module, torch.nn.Linear) for module in mixer.modules()) or kind == "bi_ssm"


@pytest.mark.parametrize("name", OPS)
def test_ops_times_every_twin_that_can_run_and_marks_the_chosen_one(run, name):
    code, lines, text, _ = run("ops", name, "--tokens", "16", "--precision", "fp32", "bf16", "--repeats", "1")
    assert code == 0
    assert all(line["check"] == "green" and line["seconds"] > 0 and line.keys() >= HEAD for line in lines)
    for precision in ("fp32", "bf16"):
        for direction in ("forward", "forward and backward"):
            rows = [line for line in lines if (line["precision"], line["direction"]) == (precision, direction)]
            able = {line["impl"] for line in rows}
            assert able | set(rows[0]["refused"]) == {"reference", *OPS[name].fast}
            assert sum(line["chosen"] for line in rows) == 1
            (reference,) = (line for line in rows if line["impl"] == "reference")
            assert reference["times_reference"] == 1
    assert "x reference" in text


def test_ops_does_not_time_what_is_wrong(run, monkeypatch):
    calls = []

    def wrong(query, key, value):
        calls.append(query.shape)
        return attention.reference(query, key, value) * 1.01

    broken = dataclasses.replace(attention, fast={"wrong": wrong}, refuses=lambda impl, args: "")
    monkeypatch.setitem(OPS, "attention", broken)
    code, lines, text, _ = run("ops", "attention", "--tokens", "16", "--repeats", "1")
    assert code == 1
    rows = [line for line in lines if line["impl"] == "wrong"]
    assert len(rows) == len(calls) == 2  # once for each check, never for a timing
    assert all(row["check"].startswith("output is off by") and row["seconds"] is None for row in rows)
    assert all(line["seconds"] > 0 for line in lines if line["impl"] == "reference")
    assert "output is off by" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["modle"], 64, "no benchmark 'modle'; did you mean 'model'?"),
        (["model", "dit-s-3"], 64, "no preset 'dit-s-3'"),
        (["mixers", "bi_wvk"], 64, "no mixer 'bi_wvk'; did you mean 'bi_wkv'?"),
        (["mixers", "--tokens", "200"], 64, "tokens 200: expected the square of an even number"),
        (["model", "dit-s-2", "--device", "cuda:99"], 64, "device 'cuda:99' is not on this machine"),
        (["model", "dit-s-2", "--device", "cudda"], 64, "did you mean 'cuda'?"),
    ],
)
def test_wrong_names_give_one_clear_line(run, arguments, code, words):
    found, lines, _, complaint = run(*arguments)
    assert (found, lines) == (code, [])
    assert words in complaint
    assert complaint.count("\n") == 1


def test_without_a_name_the_benchmarks_are_listed(run):
    code, _, text, _ = run()
    assert code == 0
    assert "model" in text
    assert "ops" in text


def test_every_name_in_the_table_is_a_module_with_a_main():
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks", "ops", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--tokens" in found.stdout
    from importlib import import_module

    from benchmarks.__main__ import BENCHMARKS

    assert all(callable(import_module(f"benchmarks.{name}").main) for name in BENCHMARKS)


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git")
def test_the_tree_id_is_that_of_git(tmp_path):
    from benchmarks.record import git_tree_id

    for name, text in {"b.py": "1\n", "a/x.txt": "", "a.py": "ä", "a-b/c/d": "2"}.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(text, encoding="utf-8")
    (tmp_path / "folder" / "b.py").chmod(0o755)
    git = ["git", "-C", str(tmp_path), "-c", "core.autocrlf=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "folder"], check=True)
    tree = subprocess.run([*git, "write-tree", "--prefix=folder/"], capture_output=True, text=True, check=True)
    (tmp_path / "folder" / "__pycache__").mkdir()
    (tmp_path / "folder" / "__pycache__" / "b.pyc").write_text("cache")
    assert git_tree_id(tmp_path / "folder") == tree.stdout.strip()


def test_a_table_lines_numbers_up_on_the_right():
    from benchmarks.record import table

    assert table(["name", "ms"], [["a", "1.5"], ["long", "10.25"]]) == (
        "name     ms\n----  -----\na       1.5\nlong  10.25\n"
    )
