"""`evaluate` end to end on a tiny run: streams, files and several processes give the same numbers, and say the same."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_runs import tiny_config, write_set

from smalti.cli import main
from smalti.errors import ConfigError, DataError, NumericError
from smalti.evaluation.networks import build_network
from smalti.evaluation.protocol import unequal
from smalti.evaluation.results import read_result
from smalti.sampling import SamplingConfig
from smalti.training.config import OptimizerConfig
from smalti.workflows import evaluate_sources
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
    real = f"{place / 'data'}#train"
    _, stored = _evaluate(place, source, reference=real, training=real, drawing=None)
    assert _values(stored) == _values(streamed)
    assert unequal(streamed.protocol, stored.protocol) == []
    assert streamed.protocol.digest == stored.protocol.digest


def test_a_set_that_is_not_whole_is_refused(place):
    folder = place / "partial"
    flags = ["--seeds", "0-9", "--out", str(folder), "--device", "cpu", *SAMPLER_FLAGS]
    assert main(["sample", str(place / "run"), *flags]) == 0
    next(folder.glob("0*.png")).unlink()
    with pytest.raises(DataError, match="a set of 10 samples, 9 of them are there"):
        _evaluate(place, "partial", reference=str(place / "data"), drawing=None)


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


def test_images_drawn_before_they_can_be_measured_are_not_drawn(place, capsys, monkeypatch):
    """Whatever is wrong is said before the first image, not after the last one."""
    network = build_network("lite0@32", device="cpu")
    monkeypatch.setattr("smalti.workflows.evaluate.build_network", lambda spec, device: network)
    monkeypatch.setattr("smalti.workflows.evaluate.extract", lambda *args, **rest: pytest.fail("it drew"))
    (place / "a-file").write_text("x")
    few = str(write_set(place / "few", count=16))
    run = [str(place / "run"), "--features", "lite0@32", "--device", "cpu", "--images", "40", *SAMPLER_FLAGS]
    wrong = [
        ([*run, "--metrics", "kidd"], "did you mean 'kid'", 64),
        ([*run, "--out", str(place / "a-file" / "x")], "is a file; give a folder", 64),
        ([*run, "--save-statistics", str(place / "x.txt")], "ends in .npz", 64),
        ([*run, "--reference", few], "64 principal axes need at least 65 reference images, this has 16", 65),
        ([*run, "--reference", "nowhere"], "--reference nowhere does not exist", 65),
        ([*run, "--reference", str(place / "run")], "is a run, and real images are needed here", 65),
        ([*run, "--training", "nowhere"], "--training nowhere does not exist", 65),
        ([str(place / "run"), *run], "is named twice", 64),
        ([*run, "--images", "20000000"], "at most 10,000,000", 64),
        ([*run, "--images", "10000000", "--metrics", "kid"], "measure fewer (--images)", 64),
        ([*run, "--sampling.guidance-scale", "nan"], "guidance_scale must be 0 or more", 64),
        ([str(place), "--features", "lite0@32"], "is a folder of runs; name those that you mean", 65),
        (["emoji32", "--reference", few, "--images", "40"], "--images would change nothing", 64),
    ]
    for arguments, says, code in wrong:
        assert main(["evaluate", *arguments]) == code, arguments
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-1].startswith("smalti: "), said
        assert says in said[-1]


def test_a_run_whose_data_are_elsewhere_says_what_it_was_trained_on(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = (place / "run" / "config.yaml").read_text()
    moved = tmp_path / "moved"
    shutil.copytree(place / "run" / "model", moved / "model")
    (moved / "config.yaml").write_text(config.replace(str(place / "data"), "my-pictures"))
    with pytest.raises(
        DataError, match=r"moved was trained on my-pictures, which does not exist seen from .*; start wh"
    ):
        evaluate([str(moved)], features="lite0@32", metrics=METRICS, drawing=DRAWING, device="cpu")


def test_the_model_folder_of_a_run_stands_for_the_run(place):
    _, by_model = _evaluate(place, "run/model", metrics=("kid",))
    _, by_run = _evaluate(place, metrics=("kid",))
    assert by_model.source == by_run.source
    assert _values(by_model) == _values(by_run)


def test_samples_that_are_not_finite_are_not_measured(place, monkeypatch):
    drawn = evaluate_sources.sample

    def overflowing(*args, **settings):
        for batch in drawn(*args, **settings):
            batch.images[0, 0, 0, 0] = torch.nan
            yield batch

    monkeypatch.setattr(evaluate_sources, "sample", overflowing)
    with pytest.raises(NumericError, match="seeds 0 to 7 have values that are not finite, and are not measured"):
        _evaluate(place)


def test_statistics_of_real_images_need_nothing_to_compare_with(place, capsys):
    kept = place / "alone.npz"
    assert evaluate([str(place / "data")], features="lite0@32", save_statistics=kept, out=place / "none") == []
    assert not (place / "none").exists()
    assert "computing" not in capsys.readouterr().err
    _, by_statistics = _evaluate(place, reference=str(kept), metrics=("fd",))
    assert by_statistics.protocol.reference.count == 96


def test_a_damaged_npz_and_another_size_than_the_reference_s_are_said(place, capsys):
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    np.savez(place / "small.npz", arr_0=images)
    settings = {"reference": str(place / "data"), "drawing": None, "metrics": ("kid",)}
    _evaluate(place, "small.npz", **settings)
    assert "small.npz has images of 16 x 16 pixels and tiny of 32 x 32: the numbers" in capsys.readouterr().err
    damaged = bytearray((place / "small.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (place / "damaged.npz").write_bytes(damaged)
    with pytest.raises(DataError, match="is damaged or cannot be read"):
        _evaluate(place, "damaged.npz", **settings)


def test_metrics_may_be_written_as_papers_and_lists_do(place, capsys):
    flags = ["--features", "lite0@32", "--reference", str(place / "data"), "--out", str(place / "words")]
    assert main(["evaluate", f"{place / 'data'}#validation", *flags, "--metrics", "KID,fd", "kid"]) == 0
    (path,) = (place / "words").glob("*.json")
    assert [number.metric for number in read_result(path).numbers] == ["kid", "fd"]


def test_too_few_real_images_for_a_floor_are_no_reason_to_fail(place, capsys):
    reference = str(write_set(place / "seventy", count=70))
    _, result = _evaluate(place, reference=reference, metrics=("fd_pca64",))
    assert result.number("fd_pca64").floor is None
    assert "what real images would get is left out, 70 are too few for two sets" in capsys.readouterr().err


def test_nothing_to_evaluate_and_two_sets_of_statistics_are_refused(place):
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate([])
    with pytest.raises(ConfigError, match="one source"):
        evaluate(["emoji32#train", "emoji32#validation"], save_statistics=place / "x.npz")
