"""Metrics while training: taken when due, of the same seeds, and what is wrong said before the first step."""

import json

import pytest
import torch
from tiny_runs import tiny_config, write_set

from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.metric import GROUPS, Metric, Values
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.networks import NETWORKS
from smalti.training.config import QualityConfig
from smalti.workflows.train import train


class Means:
    """The mean of each channel as features."""

    identity = NetworkIdentity("means", "none", "none")
    widths = {"pool": 3}  # noqa: RUF012

    def __call__(self, images):
        return {"pool": images.float().mean(dim=(2, 3))}


def _gap(ours, reference, groups):
    def gap(rows):
        return (rows - reference.rows("pool").mean(dim=0)).square().mean().item()

    rows = ours.rows("pool")
    without = () if groups is None else tuple(gap(rows[groups != g]) for g in range(GROUPS))
    return {"gap": Values(gap(rows), without)}


@pytest.fixture(autouse=True)
def _a_fast_metric(monkeypatch):
    monkeypatch.setitem(NETWORKS, "means", lambda rest, device: Means())
    monkeypatch.setitem(METRICS, "gap", Metric("Gap", "lower", ("pool",), "features", _gap, "mean"))


def _log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "quality"]


def test_quality_is_logged_when_due_and_at_the_end_and_changes_no_weight(tmp_path):
    data = write_set(tmp_path / "data")
    quality = QualityConfig(every=4, images=24, metrics=("gap",), features="means")
    watched = train(tiny_config(tmp_path / "a", data, quality=quality))
    plain = train(tiny_config(tmp_path / "b", data))
    lines = _log(tmp_path / "a")
    assert [line["step"] for line in lines] == [4, 6]
    assert all(line["gap"] > 0 and line["gap_error"] > 0 for line in lines)
    assert _log(tmp_path / "b") == []
    for a, b in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("quality", "says"),
    [
        (QualityConfig(every=1, metrics=("gapp",), features="means"), "did you mean 'gap'"),
        (QualityConfig(every=1, metrics=("gap",), features="mean"), "did you mean 'means'"),
    ],
)
def test_a_wrong_name_is_said_before_the_first_step(tmp_path, quality, says):
    with pytest.raises(ConfigError, match=says):
        train(tiny_config(tmp_path / "run", write_set(tmp_path / "data"), quality=quality))
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("wrong", [{"every": -1}, {"images": 1}, {"metrics": ()}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="quality"):
        QualityConfig(**wrong)


def test_each_look_is_told_on_the_screen_with_its_uncertainty(tmp_path, capsys):
    quality = QualityConfig(every=6, images=24, metrics=("gap",), features="means")
    train(tiny_config(tmp_path / "a", write_set(tmp_path / "data"), quality=quality))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 6: Gap-means ")]
    assert " ± " in line


def test_too_few_images_for_a_metric_are_said_before_the_first_step(tmp_path):
    quality = QualityConfig(every=4, metrics=("density",), features="means", reference_images=3)
    with pytest.raises(DataError, match="too few"):
        train(tiny_config(tmp_path / "run", write_set(tmp_path / "data"), quality=quality))
    assert not (tmp_path / "run" / "log.jsonl").exists()
