"""`evaluate` end to end on a tiny run: streams, files and several processes give the same numbers, and say the same."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_runs import tiny_config, write_set

from smalti.cli import main
from smalti.errors import ConfigError, DataError
from smalti.evaluation.protocol import unequal
from smalti.evaluation.results import read_result
from smalti.sampling import SamplingConfig
from smalti.training.config import OptimizerConfig
from smalti.workflows.evaluate import evaluate
from smalti.workflows.evaluate_sources import Drawing
from smalti.workflows.train import train

QUICK = SamplingConfig(sampler="ddim", num_inference_steps=2)
DRAWING = Drawing(images=40, micro_batch=8, sampling=QUICK)
METRICS = ("kid", "fd")
SAMPLER_FLAGS = ["--sampling.sampler", "ddim", "--sampling.num-inference-steps", "2", "--micro-batch", "8"]
NO_GUIDANCE = ["--sampling.guidance-scale", "1"]  # the default of `evaluate`, not of `sample`


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained run of some steps, its data, and a cache of its own."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = tiny_config(folder / "run", write_set(folder / "data"), optimizer=OptimizerConfig(learning_rate=0.02))
    train(config)  # far enough from where it starts that a class, a seed or a guidance scale is seen in 8 bits
    return folder


@pytest.fixture(autouse=True)
def _own_cache(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def _evaluate(place, source="run", **changes):
    settings = {"features": "lite0@32", "metrics": METRICS, "drawing": DRAWING, "device": "cpu", "out": place / "out"}
    (found,) = evaluate([str(place / source)], **(settings | changes))
    return found


def _values(result):
    return {number.metric: number.estimate for number in result.numbers}


def test_a_run_is_measured_against_the_images_it_was_trained_on(place):
    path, result = _evaluate(place)
    assert read_result(path) == result
    assert result.protocol.count == 40
    assert result.protocol.class_labels == "random"
    assert result.protocol.ema is True
    assert result.protocol.sampling["num_inference_steps"] == 2
    assert result.protocol.reference.count < 96  # without the images that training set aside
    assert [number.label for number in result.numbers] == ["KID-lite0", "FD-lite0"]
    assert all(number.floor is not None and number.estimate.standard_error > 0 for number in result.numbers)
    assert result.number("kid").estimate.value > result.number("kid").floor.value
    assert "images" in result.memorisation["sentence"]
    again = _evaluate(place)
    assert again[0] == path
    assert _values(again[1]) == _values(result)


@pytest.mark.parametrize("save", ["png", "npz"])
def test_images_on_disk_give_the_numbers_of_the_stream_and_the_same_protocol(place, save):
    _, streamed = _evaluate(place)
    folder = place / f"samples-{save}"
    flags = ["--seeds", "0-39", "--out", str(folder), "--save", save, "--device", "cpu", *SAMPLER_FLAGS, *NO_GUIDANCE]
    assert main(["sample", str(place / "run"), *flags]) == 0
    source = f"samples-{save}" + ("/samples.npz" if save == "npz" else "")
    _, stored = _evaluate(place, source, reference=f"{place / 'data'}#train", training=f"{place / 'data'}#train")
    assert _values(stored) == _values(streamed)
    assert unequal(streamed.protocol, stored.protocol) == []
    assert streamed.protocol.digest == stored.protocol.digest


def test_a_set_that_is_not_whole_is_refused(place):
    folder = place / "partial"
    flags = ["--seeds", "0-9", "--out", str(folder), "--device", "cpu", *SAMPLER_FLAGS]
    assert main(["sample", str(place / "run"), *flags]) == 0
    next(folder.glob("0*.png")).unlink()
    with pytest.raises(DataError, match="a set of 10 samples, 9 of them are there"):
        _evaluate(place, "partial", reference=str(place / "data"))


def test_statistics_kept_once_serve_as_a_reference_later(place):
    kept = place / "real.npz"
    data = str(place / "data")
    evaluate([data], features="lite0@32", metrics=["fd"], reference=data, save_statistics=kept, out=place / "out")
    _, by_images = _evaluate(place, reference=data, metrics=("fd",))
    _, by_statistics = _evaluate(place, reference=str(kept), metrics=("fd",))
    assert _values(by_statistics)["fd"].value == pytest.approx(_values(by_images)["fd"].value, rel=1e-9)
    assert by_statistics.protocol.reference.count == 96
    with pytest.raises(DataError, match="no images; precision needs the images"):
        _evaluate(place, reference=str(kept), metrics=("precision",))


def test_numbers_do_not_depend_on_how_many_processes_made_them(place):
    _, alone = _evaluate(place, out=place / "alone")
    # As many threads as each of the two: products round differently for another number.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "smalti"]
    command = [sys.executable, *launch, "evaluate", str(place / "run"), "--features", "lite0@32"]
    flags = ["--metrics", *METRICS, "--images", "40", "--device", "cpu", "--out", str(place / "two"), *SAMPLER_FLAGS]
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "XDG_CACHE_HOME": str(place / "cache-of-two")}
    ended = subprocess.run(
        [*command, *flags], capture_output=True, text=True, timeout=240, env=_environment(environment)
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("KID-lite0") == 1
    (path,) = (place / "two").glob("*.json")
    shared = read_result(path)
    assert shared.machine["processes"] == 2
    assert _values(shared) == _values(alone)


def _environment(more):
    import os

    return os.environ | more


def test_several_sources_are_shown_side_by_side(place, capsys):
    data = str(place / "data")
    flags = ["--features", "lite0@32", "--metrics", "kid", "--out", str(place / "many"), "--device", "cpu"]
    assert main(["evaluate", f"{data}#train", f"{data}#validation", "--reference", data, *flags]) == 0
    said = capsys.readouterr()
    assert said.out.count("KID-lite0") >= 2
    assert len(list((place / "many").glob("*.json"))) == 2
    assert "count: " in said.out  # the two have different numbers of images, and are not put into one column


def test_a_result_that_was_changed_is_refused(place):
    path, _ = _evaluate(place)
    document = json.loads(path.read_text())
    document["numbers"][0]["estimate"]["value"] = 0.0
    path.write_text(json.dumps(document, indent=1) + "\n")
    with pytest.raises(Exception, match="changed after it was written"):
        read_result(path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing-here", "--features", "lite0@32"], "nothing-here"),
        (["emoji32", "--features", "lite0@32"], "give --reference"),
        (["emoji32", "--reference", "emoji32", "--features", "lite0@32", "--metrics", "kidd"], "did you mean 'kid'"),
        (
            ["emoji32", "--reference", "emoji32", "--features", "lite0@32", "--metrics", "fid"],
            "defined by the inception",
        ),
        (["emoji32", "--reference", "emoji32", "--features", "lite0@8"], "32"),
        (["emoji32", "--reference", "nothing.npz", "--features", "lite0@32"], "nothing.npz"),
        (["RUN", "--images", "1"], "at least 2"),
    ],
)
def test_what_cannot_work_is_one_line_at_once(place, capsys, arguments, says):
    arguments = [str(place / "run") if a == "RUN" else a for a in arguments]
    assert main(["evaluate", *arguments]) in (64, 65)
    said = capsys.readouterr().err.strip()
    assert says in said
    assert said.splitlines()[-1].startswith("smalti: ")


def test_nothing_to_evaluate_and_two_sets_of_statistics_are_refused(place):
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate([])
    with pytest.raises(ConfigError, match="one source"):
        evaluate(["a", "b"], save_statistics=place / "x.npz")
