"""The demo from start to page with a tiny recipe: what it shows, and that an interruption changes nothing of it."""

import json
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from tiny_runs import tiny_config, write_set

import smalti.workflows.train as workflow
from smalti.cli import main
from smalti.errors import PreemptedError
from smalti.workflows import demo as demos

SECTIONS = ("Samples, by class", "What it learned, and when", "Loss", "Learned or remembered?", "Settings")
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

    def recipe(out, seed):
        config, small = real(out, seed), tiny_config(out, data)
        sampling = replace(config.preview, num_inference_steps=2)
        names = ("override", "data", "batch_size", "device", "log_every")
        return replace(config, preview=sampling, **{name: getattr(small, name) for name in names})

    monkeypatch.setattr(demos, "recipe", recipe)
    monkeypatch.setattr(demos, "_time_steps", lambda config: {"fp32": 0.25, "bf16": 0.5}[config.precision])


def result_of(out):
    return {k: v for k, v in json.loads((out / "result.json").read_text()).items() if k != "training_minutes"}


@pytest.mark.slow
def test_the_demo_writes_its_page_and_an_interruption_changes_nothing_of_it(tmp_path, tiny, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["demo", "--out", str(whole), "--minutes", "0.2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"open {(whole / 'index.html').as_uri()}\n"
    assert "60 steps in fp32 for a budget of 0.2 minutes" in captured.err

    real = workflow.save_preview

    def stop(*args):
        real(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(workflow, "save_preview", stop)
    assert main(["demo", "--out", str(stopped), "--minutes", "0.2"]) == 75
    assert "stopped by SIGTERM and saved at step 30; the same command continues" in capsys.readouterr().err
    assert not (stopped / "index.html").exists()
    monkeypatch.setattr(workflow, "save_preview", real)
    monkeypatch.setattr(demos, "_time_steps", lambda config: pytest.fail("measured again"))
    assert main(["demo", "--out", str(stopped), "--minutes", "0.2"]) == 0
    assert f"continuing {stopped} at step 30" in capsys.readouterr().err

    found = result_of(whole)
    assert result_of(stopped) == found
    assert found["steps"] == 60
    assert found["linear"] < found["constant"]
    assert len(found["strata"]) == len(found["linear_strata"]) == len(found["constant_strata"]) == 8
    assert sum(found["strata"]) / 8 == pytest.approx(found["validation"])
    assert found["nearness"]["count"] == 9 * demos.SAMPLES_PER_CLASS
    assert json.loads((whole / "result.json").read_text())["training_minutes"] > 0

    page = (whole / "index.html").read_text(encoding="utf-8")
    positions = [page.index(f"<h2>{title}</h2>") for title in SECTIONS]
    assert positions == sorted(positions)
    assert all(name in page for name in CLASSES)
    assert "http" not in page
    assert f"{found['validation']:.4f}" in page
    assert f"{found['linear']:.4f}" in page
    assert page.count("<figcaption>step ") == len(list((whole / "samples").glob("step-*.png"))) == 2
    assert page.count("<svg") == 2
    changing = re.compile(r"this call took</th>.*?</tr>|<b>[\d.]+ min</b>|--out [^<]+")
    other = (stopped / "index.html").read_text(encoding="utf-8")
    losses = re.compile(r"<polyline[^>]*>")  # the curves are drawn from the logs
    assert losses.findall(page) == losses.findall(other)
    assert changing.sub("", page) == changing.sub("", other)


def test_a_demo_that_is_done_is_drawn_again_without_training(tmp_path, tiny, monkeypatch):
    demos.demo(tmp_path, minutes=0.1, seed=0)
    before, page = (tmp_path / "log.jsonl").read_bytes(), (tmp_path / "index.html")
    page.unlink()
    monkeypatch.setattr(workflow, "save_preview", lambda *args: pytest.fail("trained again"))
    assert demos.demo(tmp_path, minutes=0.1, seed=0) == page
    assert page.exists()
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_the_demo_stops_at_a_step_and_says_so(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(workflow, "save_preview", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(PreemptedError, match="stopped by SIGINT and saved at step 30"):
        demos.demo(tmp_path, minutes=0.1, seed=0)


@pytest.mark.parametrize(
    ("minutes", "fp32", "bf16", "steps", "precision"),
    [(10, 0.1, 0.2, 5160, "fp32"), (10, 0.2, 0.1, 5160, "bf16"), (0.01, 1.0, 2.0, 60, "fp32")],
)
def test_steps_and_precision_are_chosen_for_the_budget(tmp_path, monkeypatch, minutes, fp32, bf16, steps, precision):
    """The share of the budget that training gets; never fewer than 60 steps."""
    monkeypatch.setattr(demos, "TRAINING_SHARE", 0.86)
    monkeypatch.setattr(demos, "_time_steps", lambda config: {"fp32": fp32, "bf16": bf16}[config.precision])
    config = demos._fit_to(minutes, demos.recipe(tmp_path, 3))
    assert (config.steps, config.precision, config.seed) == (steps, precision, 3)
    assert 1 <= config.validate_every <= steps
    assert 1 <= config.sample_every <= steps
    assert 1 <= config.checkpoint_every <= steps


def test_nearest_images_are_the_ones_that_a_loop_finds():
    rng = torch.Generator().manual_seed(0)
    images, others = torch.rand(5, 3, 4, 4, generator=rng) * 2 - 1, torch.rand(7, 3, 4, 4, generator=rng) * 2 - 1
    distances, indices = demos._nearest(images, others)
    for k, image in enumerate(images):
        far = [((image - other).double() * 127.5).square().mean().sqrt().item() for other in others]
        assert indices[k] == min(range(7), key=far.__getitem__)
        assert distances[k].item() == pytest.approx(min(far), rel=1e-4)
    same, _ = demos._nearest(others, others)
    assert same.max().item() < 0.1  # grey levels, by the rounding of a distance near 0
