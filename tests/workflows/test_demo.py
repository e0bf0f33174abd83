"""The demo from start to page with a tiny recipe: what it shows, and that an interruption changes nothing of it."""

import json
import os
import re
import signal
from dataclasses import replace

import pytest
from tiny_runs import tiny_config, write_set

import smalti.workflows.train as workflow
from smalti.cli import main
from smalti.errors import ConfigError, PreemptedError
from smalti.evaluation.networks import NETWORKS
from smalti.workflows import demo as demos
from smalti.workflows import demo_page, demo_quality

SECTIONS = (
    *("Samples, side by side", "Loss", "Cost", "Quality, measured on features", "What they learned, and when"),
    *("Learned or remembered?", "Settings"),
)
SMALL = {
    "dit": ("depth=1", "hidden_size=16", "num_heads=2"),
    "drwkv": ("depth=1", "hidden_size=16"),
}
CLASSES = (
    "Smileys &amp; Emotion",
    "People &amp; Body",
    "Animals &amp; Nature",
    "Food &amp; Drink",
    "Travel &amp; Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture
def tiny(monkeypatch, data):
    """The demo's own objective, optimizer and intervals; only network, images, batch and steps are smaller."""
    real = demos.recipe

    def recipe(network, out, seed):
        config, small = real(network, out, seed), tiny_config(out, data)
        sampling = replace(config.preview, num_inference_steps=2)
        names = ("data", "batch_size", "device", "log_every")
        return replace(
            config, preview=sampling, override=SMALL[network], **{name: getattr(small, name) for name in names}
        )

    monkeypatch.setattr(demos, "recipe", recipe)
    monkeypatch.setattr(demo_quality, "FEATURES", "lite0@32")
    measured = {"fp32": (0.05, 12.0), "bf16": (0.1, 12.0)}
    monkeypatch.setattr(demos, "measure_steps", lambda config: measured[config.precision])


def result_of(out):
    found = json.loads((out / "result.json").read_text())
    for row in found["networks"].values():
        del row["training_minutes"], row["seconds_per_step"]
    return found


@pytest.mark.slow
def test_the_demo_writes_its_page_and_an_interruption_changes_nothing_of_it(tmp_path, tiny, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ["demo", "--minutes", "0.2", "--networks", "dit", "drwkv", "--out"]
    assert main([*command, str(whole)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"open {(whole / 'index.html').as_uri()}\n"
    assert "0.10 s in fp32, 0.20 s in bf16 (dit 0.05, drwkv 0.05): 96 steps each in fp32" in captured.err

    real = workflow.save_preview

    def stop(run, *args):
        real(run, *args)
        if run.config.model.startswith("drwkv"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(workflow, "save_preview", stop)
    monkeypatch.setattr(demos, "SHORT_MINUTES", 0.1)
    assert main([*command, str(stopped)]) == 75
    assert "stopped by SIGTERM and saved at step 24; the same command continues" in capsys.readouterr().err
    assert not (stopped / "index.html").exists()
    monkeypatch.setattr(workflow, "save_preview", real)
    monkeypatch.setattr(demos, "measure_steps", lambda config: pytest.fail("measured again"))
    assert main([*command, str(stopped)]) == 0
    assert f"continuing {stopped / 'drwkv'} at step 24" in capsys.readouterr().err

    found = result_of(whole)
    assert result_of(stopped) == found
    assert found["steps"] == 96
    assert found["linear"] < found["constant"]
    assert list(found["networks"]) == ["dit", "drwkv"]
    for row in found["networks"].values():
        assert len(row["strata"]) == len(found["linear_strata"]) == len(found["constant_strata"]) == 8
        assert sum(row["strata"]) / 8 == pytest.approx(row["validation"])
        assert row["nearness"]["count"] == 9 * demo_page.SAMPLES_PER_CLASS
        assert row["step_megabytes"] == 12.0
        assert row["macs"] > 0

    page = (whole / "index.html").read_text(encoding="utf-8")
    positions = [page.index(f"<h2>{title}</h2>") for title in SECTIONS]
    assert positions == sorted(positions)
    assert all(name in page for name in CLASSES)
    assert "http" not in page
    assert "This ranks nothing: one seed" in page
    for row in found["networks"].values():
        assert f"{row['validation']:.4f}" in page
    assert f"{found['linear']:.4f}" in page
    assert page.count("<svg") == 2 + 2  # losses; two metrics
    assert list(found["quality"]) == ["DiT", "Diffusion-RWKV", "held-out set"]
    for name, metrics in found["quality"].items():
        assert list(metrics) == ["kid", "fd_pca64"]
        assert metrics["kid"]["value"] > found["quality"]["held-out set"]["kid"]["value"] or "held" in name
    other = (stopped / "index.html").read_text(encoding="utf-8")
    pictures = re.compile(r"<img src='[^']+'[^>]*alt='[^']*samples of")
    assert pictures.findall(page) == pictures.findall(other)
    assert len(pictures.findall(page)) == 2 * 9


def test_a_demo_that_is_done_is_drawn_again_without_training(tmp_path, tiny, monkeypatch):
    arguments = {"minutes": 0.1, "seed": 0, "networks": ("dit",)}
    demos.demo(tmp_path, **arguments)
    before, page = (tmp_path / "dit" / "log.jsonl").read_bytes(), (tmp_path / "index.html")
    page.unlink()
    monkeypatch.setattr(workflow, "save_preview", lambda *args: pytest.fail("trained again"))
    assert demos.demo(tmp_path, **arguments) == page
    assert page.exists()
    assert (tmp_path / "dit" / "log.jsonl").read_bytes() == before
    assert "This ranks nothing" not in page.read_text(encoding="utf-8")  # one network ranks nobody


def test_without_the_package_of_features_the_page_says_so(tmp_path, tiny, monkeypatch):
    def missing(rest, device):
        raise ConfigError("lite0 needs a package; install it")

    monkeypatch.setitem(NETWORKS, "lite0", missing)
    page = demos.demo(tmp_path, minutes=0.1, seed=0, networks=("dit",)).read_text(encoding="utf-8")
    assert "Not measured: lite0 needs a package; install it." in page
    assert json.loads((tmp_path / "result.json").read_text())["quality"] == {}


def test_a_demo_of_other_networks_or_settings_is_not_continued(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(workflow, "save_preview", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(demos, "SHORT_MINUTES", 0.0)
    with pytest.raises(PreemptedError, match="stopped by SIGINT and saved at step 15"):
        demos.demo(tmp_path, minutes=0.01, seed=0, networks=("dit",))
    with pytest.raises(ConfigError, match=f"{tmp_path} holds a demo of dit; name these networks or another --out"):
        demos.demo(tmp_path, minutes=0.01, seed=0, networks=("dit", "drwkv"))
    with pytest.raises(ConfigError, match=r"holds another run \(seed: 0 -> 1\); choose another --out"):
        demos.demo(tmp_path, minutes=0.01, seed=1, networks=("dit",))


@pytest.mark.parametrize("networks", [(), ("dit", "dit"), ("unet",)])
def test_networks_that_do_not_exist_or_come_twice_are_refused(tmp_path, networks):
    with pytest.raises(ConfigError, match=r"choose from dit, .*each once"):
        demos.demo(tmp_path, minutes=1, seed=0, networks=networks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("minutes", "fp32", "bf16", "steps", "precision"),
    [(10, 0.1, 0.2, 2580, "fp32"), (10, 0.2, 0.1, 2580, "bf16"), (0.01, 1.0, 2.0, 60, "fp32")],
)
def test_steps_and_precision_are_chosen_for_the_budget(tmp_path, monkeypatch, minutes, fp32, bf16, steps, precision):
    """One precision and one number of steps for all; the share of the budget that training gets; at least 60."""
    monkeypatch.setattr(demos, "TRAINING_SHARE", 0.86)
    monkeypatch.setattr(demos, "measure_steps", lambda config: ({"fp32": fp32, "bf16": bf16}[config.precision], None))
    plan = demos._make_plan(tmp_path, minutes, 3, ("dit", "drwkv"))
    assert (plan.steps, plan.precision, plan.megabytes) == (steps, precision, ())
    assert demos._stored_plan(tmp_path, ("dit", "drwkv")) == plan
    for network in plan.networks:
        config = demos._config(plan, network, tmp_path, 3)
        assert (config.steps, config.precision, config.seed) == (steps, precision, 3)
        assert 1 <= config.validate_every <= steps
        assert 1 <= config.sample_every <= steps
        assert 1 <= config.checkpoint_every <= steps
