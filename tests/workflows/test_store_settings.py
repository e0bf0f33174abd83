"""Settings of the checkpoints of a run, as far as the run and not the store must heed them."""

import dataclasses
import json
import threading

import pytest
from tiny_runs import tiny_config, write_set

from smalti.checkpoints import CheckpointStore
from smalti.errors import ConfigError
from smalti.training.config import DataConfig, OptimizerConfig, StoreConfig
from smalti.workflows.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("data"))


def test_the_best_by_validation_loss_and_every_third_stay_beside_the_newest(tmp_path, data):
    """With a rate so high that the loss does not fall to the end, so that the best is not the newest."""
    config = tiny_config(
        tmp_path / "run",
        data,
        steps=8,
        validate_every=2,
        checkpoint_every=1,
        keep_checkpoints=1,
        ema_decay=0.0,
        optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=20),
        store=StoreConfig(keep_every=3, keep_best=True),
    )
    train(config)
    lines = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "validation"}
    assert sorted(losses) == [2, 4, 6, 8]
    best = min(losses, key=losses.__getitem__)
    assert best in (2, 4)
    store = CheckpointStore(config.out / "checkpoints")
    assert store.steps() == sorted({best, 3, 6, 8})
    assert {step: store.load(step).score for step in store.steps()} == {
        step: losses.get(step) for step in store.steps()
    }


@pytest.mark.parametrize("wait", [False, True])
def test_a_run_that_is_to_wait_has_each_checkpoint_on_the_disk_before_the_next_step(tmp_path, data, monkeypatch, wait):
    real, on_disk, second = CheckpointStore.save, [], threading.Event()

    def save(self, *args, **kwargs):
        assert wait or second.wait(60)  # the disk takes longer than the next step
        return real(self, *args, **kwargs)

    def look(report):
        on_disk.append(store.steps())
        if report.step == 2:
            second.set()

    monkeypatch.setattr(CheckpointStore, "save", save)
    config = tiny_config(tmp_path / "run", data, steps=3, checkpoint_every=1, store=StoreConfig(wait=wait))
    store = CheckpointStore(config.out / "checkpoints")
    train(config, on_step=look)
    assert on_disk == ([[], [1], [1, 2]] if wait else [[], [], on_disk[2]])


@pytest.mark.parametrize("without", [{"validate_every": 0}, {"fraction": 0.0}])
def test_the_best_cannot_be_kept_without_a_validation_loss(tmp_path, data, without):
    fraction = without.pop("fraction", 0.125)
    changes = {"data": DataConfig(path=str(data), validation_fraction=fraction), "store": StoreConfig(keep_best=True)}
    config = dataclasses.replace(tiny_config(tmp_path / "run", data), **changes, **without)
    with pytest.raises(ConfigError, match="keep_best goes by"):
        train(config)
    assert not config.out.exists()
