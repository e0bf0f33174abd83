"""`make gpu`: the CUDA tests, then the benchmarks, within a time budget, with whatever Python and torch are here.

Needs no network and installs nothing for good: packages that this Python lacks may lie as wheels in `.whl/` beside
pyproject.toml. Results are appended as JSON lines to a file named after the device. Without a CUDA device it says so
and ends well. Only Python's own library is imported here, so that a missing package is a clear line.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / ".whl"
DEVICE = "cuda"
BUDGET = 510.0  # seconds; below nine minutes with what it takes to start and to end
NEEDED = ("torch", "numpy", "jaxtyping", "yaml", "safetensors", "PIL", "pytest", "pytest_timeout")


@dataclass(frozen=True)
class Step:
    """One command. `most` and `least` are seconds: its limit, and what must be left to begin it at all."""

    name: str
    module: tuple[str, ...]
    most: float
    least: float


# The project's own pytest options also check shapes, with packages that a GPU machine may lack.
OPTIONS = "addopts=-q --strict-markers --import-mode=importlib"
TESTS = Step(
    "tests", ("pytest", "tests/gpu", "-m", "gpu", "-p", "pytest_timeout", "--timeout=120", "-o", OPTIONS), 240, 20
)
# The most telling first: when time runs out, the last ones are left out and said to be.
BENCHMARKS = (
    Step(
        "ops",
        (
            "benchmarks", "ops", "--device", DEVICE, "--precision", "bf16", "fp32",
            "--tokens", "64", "256", "1024", "4096", "--repeats", "9",
        ),
        90,
        30,
    ),
    Step(
        "model XL/2",
        ("benchmarks", "model", "dit-xl-2", "--device", DEVICE, "--precision", "bf16", "--batch", "8", "64"),
        120,
        60,
    ),
    Step("features", ("benchmarks", "features", "--device", DEVICE, "--batch", "32", "256"), 60, 30),
    Step(
        "model S/2 and B/2",
        (
            "benchmarks", "model", "dit-s-2", "dit-b-2", "--device", DEVICE,
            "--precision", "bf16", "fp32", "--batch", "8", "256",
        ),
        120,
        60,
    ),
)  # fmt: skip


def main() -> int:
    """Returns 0 when all ran and passed or there is no CUDA device, else 1."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON lines")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default %(default)g)")
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory() as scratch:
        environment = _environment(Path(scratch))
        name = _cuda_device(environment)
        if name is None:
            print("make gpu: no CUDA device here, nothing was run")
            return 0
        if missing := _missing(environment):
            print(
                f"make gpu: this Python ({sys.executable}) lacks {', '.join(missing)}; install them, or put their "
                f"wheels into {WHEELS}",
                file=sys.stderr,
            )
            return 1
        out = options.out.resolve() / f"{_slug(name)}.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        print(f"make gpu: {name}; results go to {out}", flush=True)
        return _run_all(environment, Path(scratch), out, end)


def _run_all(environment: dict[str, str], scratch: Path, out: Path, end: float) -> int:
    report = scratch / "tests.xml"
    outcome = _run(TESTS, (f"--junitxml={report}",), environment, end)
    counts = _test_counts(report)
    if outcome == "ok" and not counts.get("passed"):
        outcome = "failed: no test ran"
    _append(environment, out, {"benchmark": "tests", "outcome": outcome, **counts})
    outcomes = {TESTS.name: outcome}
    for step in BENCHMARKS:
        outcomes[step.name] = _run(step, ("--out", str(out)), environment, end)
        if outcomes[step.name] != "ok":
            _append(environment, out, {"benchmark": step.name, "outcome": outcomes[step.name]})
    print("\nmake gpu:")
    for name, outcome in outcomes.items():
        print(f"  {name:20} {outcome}")
    return 0 if all(outcome == "ok" for outcome in outcomes.values()) else 1


def _run(step: Step, extra: tuple[str, ...], environment: dict[str, str], end: float) -> str:
    """Run one step within its time; returns "ok" or what went wrong."""
    left = end - time.monotonic()
    if left < step.least:
        return f"left out: {left:.0f} s of the budget were left, it needs {step.least:.0f}"
    limit = min(step.most, left)
    print(f"\n== {step.name} (at most {limit:.0f} s)", flush=True)
    # A group of its own, so that what a step starts ends with it.
    process = subprocess.Popen(
        [sys.executable, "-m", *step.module, *extra], cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if code == 0 else f"failed with exit code {code}"


def _environment(scratch: Path) -> dict[str, str]:
    """For the steps: the repository and carried wheels on the path, and repeatable matrix products."""
    paths = [str(ROOT)]
    if wheels := sorted(map(str, WHEELS.glob("*.whl"))):
        site = scratch / "site"
        options = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check")
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *wheels]
        subprocess.run(command, check=True)
        paths.append(str(site))
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    # cuBLAS is deterministic only with a workspace of fixed size; torch refuses to promise it otherwise.
    # Plugins that a machine happens to have may warn, and warnings are errors: only the one that is named is loaded.
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def _cuda_device(environment: dict[str, str]) -> str | None:
    """Its name, or None without one; a torch that is missing or broken on a machine with one is an error."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    try:
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        if not Path("/dev/nvidia0").exists():
            return None
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"make gpu: there is an NVIDIA device, but {sys.executable} cannot use torch: {last}")
    return found.stdout.strip() or None


def _missing(environment: dict[str, str]) -> list[str]:
    code = f"import importlib.util as u; print(*(n for n in {NEEDED!r} if u.find_spec(n) is None))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return found.stdout.split()


def _test_counts(report: Path) -> dict[str, object]:
    """Passed, failed and skipped tests, and the names of those that failed."""
    if not report.exists():
        return {}
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failed_names": failed,
    }


def _append(environment: dict[str, str], out: Path, values: dict[str, object]) -> None:
    """A line with the same head as the benchmarks write; a process of its own keeps torch out of this one."""
    code = (
        "import json, sys, torch; from pathlib import Path; from benchmarks.record import Recorder; "
        "values = json.loads(sys.argv[1]); "
        "Recorder(values.pop('benchmark'), torch.device(sys.argv[2]), Path(sys.argv[3])).add(**values)"
    )
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(values), DEVICE, str(out)], env=environment, cwd=ROOT, check=True
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
