"""`make gpu` where there is no GPU, and its parts that need none: limits, missing packages, counts."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_command", ROOT / "tools" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line_and_ends_well(tmp_path):
    found = subprocess.run(
        [sys.executable, "tools/gpu.py", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == "make gpu: no CUDA device here, nothing was run\n"
    assert list(tmp_path.iterdir()) == []


def make_step(gpu, tmp_path, monkeypatch, code, **limits):
    (tmp_path / "the_step.py").write_text(code)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return dataclasses.replace(gpu.Step("x", ("the_step",), 60, 1), **limits)


def test_a_step_that_ends_well_or_badly_is_told_apart(gpu, tmp_path, monkeypatch):
    end = time.monotonic() + 60
    good = make_step(gpu, tmp_path, monkeypatch, "import sys; sys.exit(sys.argv[1:] != ['--flag'])")
    assert gpu._run(good, ("--flag",), dict(os.environ), end) == "ok"
    assert gpu._run(good, (), dict(os.environ), end) == "failed with exit code 1"


def test_a_step_past_its_limit_is_stopped_with_all_that_it_started(gpu, tmp_path, monkeypatch):
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    slow = make_step(gpu, tmp_path, monkeypatch, code, most=3.0)
    start = time.monotonic()
    assert gpu._run(slow, (), dict(os.environ), start + 60) == "stopped after 3 s"
    assert time.monotonic() - start < 60
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    for _ in range(1000):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the step had started is still running")


def test_a_step_is_left_out_when_too_little_of_the_budget_is_left(gpu, tmp_path, monkeypatch):
    late = make_step(gpu, tmp_path, monkeypatch, "raise SystemExit(3)", least=30.0)
    assert gpu._run(late, (), dict(os.environ), time.monotonic() + 10).startswith("left out: 10 s")


def test_the_budget_stays_below_nine_minutes(gpu):
    # Starting, and writing the last lines after a step was stopped, are counted as 30 s.
    assert gpu.BUDGET + 30 <= 9 * 60
    assert gpu.TESTS.most < gpu.BUDGET
    assert all(s.least <= s.most for s in (gpu.TESTS, *gpu.BENCHMARKS))


@pytest.mark.slow
def test_all_steps_run_and_every_outcome_becomes_a_line(gpu, tmp_path, monkeypatch, capfd):
    (tmp_path / "test_two.py").write_text("def test_good():\n    pass\ndef test_bad():\n    assert 0\n")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    tests = ("pytest", str(tmp_path / "test_two.py"), "-p", "no:cacheprovider", *gpu.TESTS.module[4:])
    monkeypatch.setattr(gpu, "TESTS", gpu.Step("tests", tests, 60, 1))
    good = ("benchmarks", "ops", "attention", "--tokens", "16", "--repeats", "1")
    steps = (gpu.Step("good", good, 60, 1), gpu.Step("bad", ("benchmarks", "nothing"), 60, 1))
    monkeypatch.setattr(gpu, "BENCHMARKS", steps)
    out = tmp_path / "fake.jsonl"
    assert gpu._run_all(gpu._environment(tmp_path), tmp_path, out, time.monotonic() + 120) == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert all({"device", "torch", "commit", "tree"} <= line.keys() for line in lines)
    assert (lines[0]["benchmark"], lines[0]["passed"], lines[0]["failed_names"]) == ("tests", 1, ["test_bad"])
    assert {line["benchmark"] for line in lines[1:-1]} == {"ops"}
    assert (lines[-1]["benchmark"], lines[-1]["outcome"]) == ("bad", "failed with exit code 64")
    summary = capfd.readouterr().out.split("make gpu:")[-1].split("\n")
    assert [line.split()[:2] for line in summary if line] == [["tests", "failed"], ["good", "ok"], ["bad", "failed"]]


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="wheels are unpacked by pip")
def test_carried_wheels_come_onto_the_path(gpu, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "word = 'here'\n")
        info = "carried-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(gpu, "WHEELS", wheels)
    environment = gpu._environment(tmp_path / "scratch")
    found = subprocess.run(
        [sys.executable, "-c", "import carried, smalti; print(carried.word, smalti.__file__)"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["here", str(ROOT / "smalti" / "__init__.py")]


def test_missing_packages_are_named(gpu, monkeypatch):
    environment = dict(os.environ)
    assert gpu._missing(environment) == []
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package_here"))
    assert gpu._missing(environment) == ["no_such_package_here"]


def test_test_results_are_counted_from_the_report(gpu, tmp_path):
    report = tmp_path / "report.xml"
    assert gpu._test_counts(report) == {}
    report.write_text(
        "<testsuites><testsuite>"
        "<testcase name='a'/><testcase name='b'><failure/></testcase><testcase name='c'><skipped/></testcase>"
        "<testcase name='d'><error/></testcase></testsuite></testsuites>"
    )
    assert gpu._test_counts(report) == {"passed": 1, "failed": 2, "skipped": 1, "failed_names": ["b", "d"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: they would run")
def test_the_benchmarks_that_it_runs_exist_with_these_options(gpu, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.__main__ import main

    for step in gpu.BENCHMARKS:
        package, *arguments = step.module
        assert package == "benchmarks"
        assert main(arguments) == 64  # wrong options would have ended the parser with 2 before the device was looked at
        assert capsys.readouterr().err == "device 'cuda' is not on this machine; use --device cpu\n"


def test_device_names_become_file_names(gpu):
    assert gpu._slug("NVIDIA H200") == "nvidia-h200"
    assert gpu._slug("NVIDIA GeForce RTX 4090 (laptop)") == "nvidia-geforce-rtx-4090-laptop"
