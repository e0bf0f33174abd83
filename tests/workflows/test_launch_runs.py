"""The printed script with the real torchrun and real training: killed, stopped, and at the end the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import flags, write_set

from smalti.cli import main

ROOT = Path(__file__).parents[2]
STEPS = 40
PROCESSES = 2

pytestmark = pytest.mark.long


@pytest.fixture
def script(tmp_path, capsys):
    """Write a script that trains into a folder of that name; returns how to start it."""
    data = write_set(tmp_path / "data")
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    running = []

    def start(name):
        path = tmp_path / f"{name}.sh"
        command = flags(tmp_path / name, data, "--steps", str(STEPS))
        launch = ["launch", "--emit", "torchrun", "--gpus-per-node", "0", "--processes-per-node", str(PROCESSES)]
        assert main([*launch, "--backoff", "0", "--grace", "60", "--file", str(path), "--", *command]) == 0
        with (tmp_path / f"{name}.txt").open("a") as log:
            running.append(subprocess.Popen(["bash", path], env=environment, stdout=log, stderr=log))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)
    capsys.readouterr()


def newest(out):
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def wait_for_step(out, step, process):
    deadline = time.monotonic() + 120
    while newest(out) < step:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def below(process):
    """Process ids of all descendants."""
    found, todo = [], [process.pid]
    while todo:
        done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(todo.pop())], capture_output=True, text=True)
        children = [int(pid) for pid in done.stdout.split()]
        found += children
        todo += children
    return found


def ranks(process):
    """The processes that train."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in below(process)}
    return [
        p for p, words in lines.items() if b"smalti.cli.launched" in words and b"torch.distributed.run" not in words
    ]


def bits(out):
    """What the run came to: the finished model, and every step's loss."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "train"}
    return (out / "model" / "model.safetensors").read_bytes(), losses


def test_a_killed_rank_and_a_stopped_script_change_no_bit(script, tmp_path):
    whole = script("whole")
    assert whole.wait(200) == 0, (tmp_path / "whole.txt").read_text()

    killed = script("killed")
    wait_for_step(tmp_path / "killed", 6, killed)
    alive = ranks(killed)
    assert len(alive) == PROCESSES
    os.kill(alive[-1], signal.SIGKILL)
    assert killed.wait(200) == 0, (tmp_path / "killed.txt").read_text()
    said = (tmp_path / "killed.txt").read_text()
    assert said.count("again in 0 s (1 of 5 without a step forward)") == 1
    assert "continuing" in said

    stopped = script("stopped")
    wait_for_step(tmp_path / "stopped", 6, stopped)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(100) == 75, (tmp_path / "stopped.txt").read_text()
    assert not below(stopped)
    assert newest(tmp_path / "stopped") < STEPS
    assert script("stopped").wait(200) == 0
    assert bits(tmp_path / "killed") == bits(tmp_path / "stopped") == bits(tmp_path / "whole")


def test_settings_that_are_refused_end_the_script_at_once(script, tmp_path):
    first = script("other")
    wait_for_step(tmp_path / "other", 2, first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(100) == 75
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    assert script("other").wait(100) == 64
    assert "holds another run" in (tmp_path / "other.txt").read_text()
