"""A dry run tries everything and leaves nothing; what would stop the run stops it, with the same exit code."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import flags, tiny_config, write_set

from smalti.checkpoints import RunLock
from smalti.cli import main
from smalti.errors import CheckpointError, ConfigError, DataError, NumericError, RunLockedError, StorageError
from smalti.storage.filesystem import LocalFileSystem
from smalti.training import loop
from smalti.training.config import StoreConfig
from smalti.workflows import dry_run as module
from smalti.workflows.dry_run import dry_run
from smalti.workflows.train import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run of four of six steps; tests copy it."""
    out = tmp_path_factory.mktemp("run") / "out"
    train(tiny_config(out, data, steps=4))
    return out


@pytest.fixture
def tried(tmp_path, data):
    """Try a run with these changes; returns what it came to and what was said."""

    def run(**changes):
        lines = []
        run.lines = lines
        done = dry_run(tiny_config(**({"out": tmp_path / "out", "data": data} | changes)), lines.append)
        return done, "\n".join(lines)

    return run


def tree(folder):
    """Every file below with its bytes."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_it_says_what_the_run_will_find_and_leaves_nothing(tried, tmp_path):
    _, said = tried()
    for part in (
        "96 examples of 9 classes, 3 x 32 x 32 (pixels)",
        "84 to train on, 12 held out",
        "read 8 examples from all over it",
        "8 images at once of 8 in fp32",
        "which fits; largest micro-batch that fits: 8",
        "is new: step 0",
        "step 1: loss ",
        "step 2: loss ",
        "read back bit for bit",
        "6 steps take",
    ):
        assert part in said, part
    assert list(tmp_path.iterdir()) == []


def test_its_two_steps_are_those_of_the_run(tried, tmp_path, data):
    done, _ = tried()
    reports = []
    train(tiny_config(tmp_path / "out", data), on_step=reports.append)
    assert done.losses == tuple(report.loss for report in reports[:2])
    assert done.grad_norms == tuple(report.grad_norm for report in reports[:2])


def test_a_run_folder_stays_byte_for_byte_and_is_told_to_go_on(tried, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before = tree(tmp_path / "out")
    _, said = tried()
    assert "holds step-0000000004" in said
    assert "the run would continue at step 4" in said
    assert "other than at the last start: steps: 4 -> 6" in said
    assert tree(tmp_path) == {Path("out"): None} | {Path("out") / path: data for path, data in before.items()}
    _, said = tried(steps=4)
    assert "nothing is left to do" in said


def test_a_folder_without_a_run_gets_no_lock_file(tried, tmp_path):
    (tmp_path / "out").mkdir()
    _, said = tried()
    assert "holds no checkpoint: step 0" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_another_run_s_folder_is_refused(tried, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"holds another run .*seed: 0 -> 5"):
        tried(seed=5)
    assert tree(tmp_path) == before


def test_a_folder_in_use_is_refused(tried, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    with RunLock(tmp_path / "out"), pytest.raises(RunLockedError, match="is being written by"):
        tried()


def test_a_folder_that_another_machine_left_is_taken_only_on_request(trained, tmp_path, data):
    shutil.copytree(trained, tmp_path / "out")
    holder = {"pid": 1, "host": "elsewhere", "boot_id": "other", "started": 1, "since": "2026-01-01 00:00:00"}
    (tmp_path / "out" / ".lock").write_text(json.dumps(holder))
    before = tree(tmp_path)
    config = tiny_config(tmp_path / "out", data)
    with pytest.raises(RunLockedError, match="start this one with --steal"):
        dry_run(config, print)
    dry_run(config, print, steal=True)
    assert tree(tmp_path) == before
    assert main([*flags(tmp_path / "out", data)]) == 73
    assert main([*flags(tmp_path / "out", data), "--steal"]) == 0


def test_a_file_in_the_place_of_the_folder_is_refused(tried, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        tried()


# --- memory


def with_memory(monkeypatch, free):
    monkeypatch.setattr(module, "_free_memory", lambda run: free)


def test_a_network_that_does_not_fit_is_not_trained_and_everything_else_was_looked_at(tried, monkeypatch, tmp_path):
    with_memory(monkeypatch, 1 << 20)
    monkeypatch.setattr(module, "_trial", lambda *args: pytest.fail("it was trained"))
    with pytest.raises(ConfigError, match=r"does not fit here.*nothing was trained"):
        tried(batch_size=64)
    said = "\n".join(tried.lines)
    assert "which does not fit here" in said
    assert "is new: step 0" in said
    assert list(tmp_path.iterdir()) == []


def test_it_advises_the_micro_batch_that_fits_and_that_one_does_fit(tried, monkeypatch):
    with_memory(monkeypatch, 6 << 20)
    with pytest.raises(ConfigError, match=r"Try --micro-batch \d+"):
        tried(batch_size=64)
    largest = int(next(line for line in tried.lines if "largest micro-batch" in line).rsplit(" ", 1)[1])
    assert 1 <= largest < 64
    done, said = tried(batch_size=64, micro_batch=largest)
    assert done.micro_batch == largest
    assert f"{largest} images at once of 64" in said or f"{largest} image at once of 64" in said


def test_a_recipe_that_is_too_large_is_refused_without_its_memory(monkeypatch, capsys, tmp_path):
    with_memory(monkeypatch, 1 << 28)
    # 4 x 32 x 32 and 1000 classes are another set's; the network is as large with these.
    arguments = ["train", "--config", "dit-s-2-imagenet256", "--data.path", "emoji32", "--device", "cpu", "--dry-run"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 64
    captured = capsys.readouterr()
    assert "dit-s-2 does not fit here" in captured.err
    assert "256 images at once of 256 in tf32" in captured.out


def test_free_memory_is_what_the_machine_says(tried):
    _, said = tried()
    shown = next(line for line in said.splitlines() if line.startswith("memory"))
    free = float(shown.split(" of ")[2].split(" GiB free")[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:")) / 2**20
    assert 0 < free < total


# --- what goes wrong


def test_settings_are_refused_as_by_the_run(tried):
    with pytest.raises(ConfigError, match="no preset"):
        tried(model="dit-xxl")


def test_data_that_is_not_there_is_refused(tried, tmp_path):
    with pytest.raises((ConfigError, DataError)):
        tried(data=tmp_path / "nothing")


def test_a_disk_without_room_for_checkpoints_is_refused(tried, monkeypatch, tmp_path):
    monkeypatch.setattr(LocalFileSystem, "free_bytes", lambda self, folder: 100_000)
    with pytest.raises(StorageError, match="3 checkpoints does not fit"):
        tried()
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_stay_for_good_are_counted(tried, monkeypatch):
    free = 20_000_000
    monkeypatch.setattr(LocalFileSystem, "free_bytes", lambda self, folder: free)
    _, said = tried(steps=1000, store=StoreConfig(keep_every=1))
    assert "at the end 1002 of them stay" in said
    assert "store.keep_every 1 fills the disk before the end" in said


def test_a_loss_that_is_not_finite_ends_it(tried, monkeypatch, tmp_path):
    real = loop.training_losses

    def spoiled(*args, **kwargs):
        losses = real(*args, **kwargs)
        return losses._replace(loss=losses.loss * torch.nan)

    monkeypatch.setattr(loop, "training_losses", spoiled)
    with pytest.raises(NumericError, match="step 1 has a loss or gradient that is not finite"):
        tried()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_comes_back_changed_ends_it(tried, monkeypatch, tmp_path):
    monkeypatch.setattr(module.TrainState, "restore", lambda self, stored: None)
    with pytest.raises(CheckpointError, match="is not what was written"):
        tried()
    assert list(tmp_path.iterdir()) == []


def test_on_the_command_line_it_prints_and_ends_with_the_code_of_what_is_wrong(tmp_path, data, capsys):
    arguments = [*flags(tmp_path / "out", data), "--dry-run"]
    assert main(arguments) == 0
    assert "read back bit for bit" in capsys.readouterr().out
    assert main([*arguments, "--model", "dit-xxl"]) == 64
    with RunLock(tmp_path / "out"):
        assert main(arguments) == 73
    assert (tmp_path / "out").is_dir()


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_under_torchrun_one_process_speaks_and_nothing_is_left(strategy, tmp_path, data):
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*flags(tmp_path / "out", data), "--parallel.strategy", strategy, "--dry-run"]
    done = subprocess.run(
        [*torchrun, "-m", "smalti", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("read back bit for bit") == 1
    assert "4 images at once of 8" in done.stdout
    assert list(tmp_path.iterdir()) == []
    alone = dry_run(dataclasses.replace(tiny_config(tmp_path / "out", data)), lambda line: None)
    assert f"step 1: loss {alone.losses[0]:.4f}, gradient norm {alone.grad_norms[0]:.4f}" in done.stdout
