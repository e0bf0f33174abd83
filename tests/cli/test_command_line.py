"""The command as a newcomer meets it. Every error that a user can mend is one line on stderr, without traceback."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_runs import flags, write_set

import smalti
from smalti import cli, errors
from smalti.checkpoints import RunLock, load_bundle, save_model
from smalti.cli import GROUPS, VERBS, main
from smalti.config import to_dict
from smalti.presets import PRESETS, create_model
from smalti.storage.filesystem import read_record
from smalti.storage.sealed import seal
from smalti.training import loop
from smalti.training.prefetch import WorkerDiedError
from smalti.workflows.sample import parse_seeds

SAMPLING = ["--sampling.num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A finished run folder; tests only look at it."""
    out = tmp_path_factory.mktemp("run")
    assert main(flags(out, data)) == 0
    return out


@pytest.fixture
def refused(capsys):
    """Run a command that must fail: returns (exit code, its one line)."""

    def run(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("smalti: ")
        return code, lines[0].removeprefix("smalti: ")

    return run


def pictures(folder):
    return {p.name: p.read_bytes() for p in folder.glob("0*.png")}


# --- help


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help_lists_every_verb_with_a_line_about_it(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for verb, (_, _, text) in VERBS.items():
        assert f"smalti {verb} " in out
        assert text in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_every_verb_stands_in_one_group_of_the_help():
    assert sorted(verb for verbs in GROUPS.values() for verb in verbs) == sorted(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_s_help_explains_its_settings(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: smalti {verb}")
    module, name, _ = VERBS[verb]
    first = getattr(importlib.import_module(module), name).__doc__.split("\n")[0]
    assert first in out


def test_train_help_says_what_the_settings_mean(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for said in ("optimizer steps", "--override depth=6 patch_size=4", "--data.path", "--config run.yaml"):
        assert said in out


@pytest.mark.parametrize("argument", ["-V", "--version", "version"])
def test_the_version_is_told(argument, capsys):
    assert main([argument]) == 0
    assert capsys.readouterr().out == f"smalti {smalti.__version__}\n"


def test_help_and_version_do_not_wait_for_torch():
    """In a process of its own; `import torch` alone takes longer than all of this."""
    code = "import sys; from smalti.cli import main; main([]); main(['-V']); sys.exit('torch' in sys.modules)"
    root = Path(smalti.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_python_m_smalti_is_the_command_and_hands_its_exit_code_on():
    root = Path(smalti.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "smalti", "sampel"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 64
    assert done.stderr == "smalti: there is no command 'sampel'; did you mean 'sample'?; see `smalti --help`\n"


# --- wrong commands and flags


def test_of_several_processes_the_first_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert main(["trian"]) == 64
    assert capsys.readouterr().err.startswith("smalti: there is no command 'trian'")


def test_another_process_is_silent_if_it_is_stopped_after_the_first_has_said_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli, "PATIENCE", 60.0)
    before = signal.getsignal(signal.SIGTERM)

    def stop():
        while signal.getsignal(signal.SIGTERM) is before:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    torchrun = threading.Thread(target=stop, daemon=True)
    torchrun.start()
    assert main(["trian"]) == 64
    torchrun.join()
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_process_says_itself_what_the_first_has_not_met(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("smalti.cli.PATIENCE", 0.1)
    assert main(["trian"]) == 64
    assert capsys.readouterr().err.startswith("process 3: smalti: there is no command 'trian'")


@pytest.mark.parametrize(
    "verb", [["train"], ["encode", "emoji32", "--codec", "x"], ["autoencoder"]], ids=lambda v: v[0]
)
def test_results_are_not_written_to_a_url(refused, verb):
    code, line = refused(*verb, "--out", "s3://bucket/run")
    assert (code, line) == (
        64,
        "--out s3:/bucket/run is a URL, and only checkpoints go to such places; give a local folder",
    )
    assert not Path("s3:").exists()


@pytest.mark.parametrize("verb", ["train", "autoencoder"])
def test_a_folder_of_latents_is_no_place_for_a_run(refused, tmp_path, verb):
    (tmp_path / "latents.json").write_text("{}")
    assert refused(verb, "--out", tmp_path) == (64, f"{tmp_path} holds latents; choose another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["latents.json"]


def test_a_run_does_not_go_into_the_folder_of_its_images(refused, tmp_path):
    folder = folder_of_images(tmp_path / "photos")
    code, line = refused(*flags(folder, folder, "--data.image-size", "16"))
    assert (code, line) == (64, f"{folder} holds the images that are read; choose another --out")
    assert sorted(path.name for path in folder.iterdir()) == ["cats", "dogs"]


def test_latents_in_the_place_of_images_are_called_by_name(refused, tmp_path):
    (tmp_path / "latents.json").write_text("{}")
    code, line = refused("autoencoder", "--data", tmp_path, "--out", tmp_path / "run")
    assert code == 65
    assert line == f"{tmp_path} holds latents, made by `smalti encode` already; give a folder of images"


def test_a_mistyped_verb_gets_a_suggestion(refused):
    assert refused("trian") == (64, "there is no command 'trian'; did you mean 'train'?; see `smalti --help`")


def test_half_a_verb_is_told_its_other_half(refused):
    assert refused("data") == (64, "`smalti data` needs one more word: data check or data build")


def test_an_unknown_flag_gets_a_suggestion_and_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--setps", "3"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "--setps" in err
    assert "--steps INT" in err
    assert "Traceback" not in err


def test_a_value_that_is_no_number_is_refused_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--steps", "many"])
    assert end.value.code == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--batch-size", "4", "--micro-batch", "5"], "micro_batch 5 must be between 1 and batch_size 4"),
        (["train", "--objective.label-dropout", "3"], "label_dropout must be between 0 and 1, got 3.0"),
        (["train", "--optimizer.learning-rate", "0"], "learning_rate must be above 0, got 0.0"),
        (["train", "--preview.eta", "1"], "eta 1.0 has no meaning for sampler 'dpm-solver++'; it belongs to ddim"),
        (["train", "--objective.schedule", "flow"], "schedule 'flow' starts from pure noise"),
        (["sample", "x", "--sampling.num-inference-steps", "0"], "num_inference_steps must be at least 1, got 0"),
        (["demo", "--minutes", "0"], "minutes must be above 0, got 0.0"),
    ],
)
def test_a_setting_out_of_range_is_one_line_and_code_64_however_deep_it_stands(refused, arguments, said):
    code, line = refused(*arguments)
    assert code == 64
    assert said in line


# --- every kind of error


def kinds(cls):
    return [cls, *(kind for sub in cls.__subclasses__() for kind in kinds(sub))]


CODES = {
    errors.SmaltiError: 2,
    errors.ConfigError: 64,
    errors.DataError: 65,
    errors.CheckpointError: 65,
    errors.NumericError: 70,
    errors.RunLockedError: 73,
    errors.StorageError: 74,
    errors.PreemptedError: 75,
    errors.PeerLostError: 75,
    WorkerDiedError: 71,
    loop.MicroBatchTooLargeError: 75,
}
MORE = {loop.MicroBatchTooLargeError: (8,)}  # what else they are made from


@pytest.mark.parametrize("kind", kinds(errors.SmaltiError), ids=lambda kind: kind.__name__)
def test_every_kind_of_error_is_one_line_with_its_exit_code(refused, monkeypatch, kind):
    expected = next(code for base in kind.__mro__ for known, code in CODES.items() if known is base)

    def fail(self):
        raise kind("what came; what was expected; what to do", *MORE.get(kind, ()))

    monkeypatch.setattr(importlib.import_module("smalti.cli.presets").Presets, "run", fail)
    assert refused("presets") == (expected, "what came; what was expected; what to do")


def test_an_interrupted_command_says_so_with_code_130(refused, monkeypatch):
    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("smalti.cli.presets").Presets, "run", fail)
    assert refused("presets") == (130, "interrupted")


def test_a_bug_shows_its_traceback(monkeypatch):
    def fail(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(importlib.import_module("smalti.cli.presets").Presets, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["presets"])


# --- train


def test_train_says_what_it_reached_and_how_to_draw_from_it(tmp_path, data, capsys):
    assert main(flags(tmp_path / "run", data)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("validation loss ")
    assert "the best linear denoiser has" in out[0]
    assert out[1] == f"model in {tmp_path / 'run' / 'model'}; draw from it with `smalti sample {tmp_path / 'run'}`"


def test_the_same_command_again_continues(tmp_path, data, capsys):
    assert main(flags(tmp_path, data, "--steps", "4")) == 0
    assert main(flags(tmp_path, data, "--steps", "6")) == 0
    assert f"continuing {tmp_path} at step 4" in capsys.readouterr().err


def test_settings_come_from_a_file_and_flags_change_them(tmp_path, trained, capsys):
    for option in (["--config", str(trained / "config.yaml")], [f"--config={trained / 'config.yaml'}"]):
        out = tmp_path / str(len(option))
        assert main(["train", *option, "--out", str(out), "--steps", "2", "--optimizer.learning-rate", "0.5"]) == 0
        used = yaml.safe_load((out / "config.yaml").read_text())
        expected = yaml.safe_load((trained / "config.yaml").read_text())
        expected |= {"out": str(out), "steps": 2, "optimizer": expected["optimizer"] | {"learning_rate": 0.5}}
        assert used == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("setps: 3", "unknown setting 'setps'; did you mean 'steps'?"),
        ("data: {pth: emoji32}", "unknown setting 'pth'; did you mean 'path'?"),
        ("steps: [1", "cannot be read as YAML"),
        (None, "does not exist; give the path of a YAML file with settings"),
    ],
)
def test_a_settings_file_with_something_wrong_is_one_line(refused, tmp_path, text, said):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    code, line = refused("train", "--config", path)
    assert code == 64
    assert str(path) in line
    assert said in line


def test_config_without_a_path_is_one_line(refused):
    assert refused("train", "--config") == (64, "--config needs the path of a YAML file")


def test_a_wrong_preset_name_gets_a_suggestion(refused, tmp_path):
    code, line = refused("train", "--model", "dit-x-2", "--out", tmp_path / "run")
    assert (code, line) == (64, "no preset 'dit-x-2'; did you mean 'dit-xl-2'? (`smalti presets` lists them all)")
    assert not (tmp_path / "run").exists()


def test_a_missing_folder_of_images_is_one_line(refused, tmp_path):
    code, line = refused("train", "--data.path", tmp_path / "photos", "--out", tmp_path / "run")
    assert code == 65
    assert f"'{tmp_path / 'photos'}' is neither an image set (emoji32, emoji64) nor an existing folder" in line
    assert not (tmp_path / "run").exists()


def folder_of_images(folder, count=10):
    for k in range(count):
        path = folder / ("cats" if k % 2 else "dogs") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * k, 255 - 20 * k, 9)).save(path)
    return folder


def test_one_broken_image_in_a_folder_is_named_and_can_be_left_out(refused, tmp_path, capsys):
    folder = folder_of_images(tmp_path / "photos")
    broken = folder / "cats" / "broken.png"
    broken.write_bytes((folder / "cats" / "1.png").read_bytes()[:60])
    code, line = refused(*flags(tmp_path / "run", folder, "--data.image-size", "16"))
    assert code == 65
    assert "1 of 11 files cannot be used ('cats/broken.png': damaged: " in line
    assert line.endswith("repair or remove it, or leave it out with skip_unreadable")
    assert not (tmp_path / "run").exists()
    assert main(flags(tmp_path / "run", folder, "--data.image-size", "16", "--data.skip-unreadable")) == 0


def test_an_empty_folder_and_a_class_without_images_are_one_line(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    code, line = refused(*flags(tmp_path / "run", tmp_path / "empty"))
    assert code == 65
    assert str(tmp_path / "empty") in line
    folder = folder_of_images(tmp_path / "photos")
    (folder / "birds").mkdir()
    code, line = refused(*flags(tmp_path / "run", folder, "--data.image-size", "16"))
    assert code == 65
    assert "birds" in line


def test_changed_settings_in_the_same_folder_are_refused_by_name(refused, trained, data):
    code, line = refused(*flags(trained, data, "--seed", "5"))
    assert code == 64
    assert line == f"{trained} holds another run (seed: 0 -> 5); choose another --out"


def test_a_second_writer_gets_73_and_the_name_of_the_first(refused, trained, data):
    with RunLock(trained):
        code, line = refused(*flags(trained, data))
    assert code == 73
    assert f"is being written by process {os.getpid()} on" in line


def test_an_out_folder_that_cannot_be_is_one_line(refused, tmp_path, data):
    (tmp_path / "file").write_text("")
    code, line = refused(*flags(tmp_path / "file" / "run", data))
    assert (code, line) == (64, f"--out {tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is a file; give a folder")


def test_numbers_that_are_not_finite_end_with_70(tmp_path, data, monkeypatch, capsys):
    real = loop.training_losses
    monkeypatch.setattr(loop, "training_losses", lambda *a, **k: (r := real(*a, **k))._replace(loss=r.loss * math.nan))
    assert main(flags(tmp_path, data, "--steps", "30")) == 70
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(
        "smalti: 11 of the last 1000 steps had a loss or gradient that is not finite"
    )
    assert not (tmp_path / "model").exists()


def test_an_unknown_device_is_one_line(refused, tmp_path, data):
    code, line = refused(*flags(tmp_path, data, "--device", "gpu"))
    assert (code, line) == (64, "device 'gpu' is not one of auto, cpu, cuda, cuda:N, mps")


# --- sample


def test_samples_do_not_depend_on_the_order_or_the_split_of_their_seeds(trained, tmp_path, capsys):
    """Bit for bit, with the same micro-batch; also ancestral noise is drawn from each image's own seed."""
    for k, sampler in enumerate((["--sampling.sampler", "ddpm"], [])):
        common = ["--micro-batch", "4", *SAMPLING, *sampler]
        parts = {
            "whole": ["0-6"],
            "reversed": ["6,5,4,3,2,1,0"],
            "split": ["5-6", "0-1,4", "2,3"],
            "apart": ["3", "0-6"],
        }
        found = {}
        for name, seeds in parts.items():
            found[name] = {}
            for i, part in enumerate(seeds):
                out = tmp_path / f"{name}{k}" / str(i)
                assert main(["sample", str(trained), "--seeds", part, "--out", str(out), *common]) == 0
                found[name] |= pictures(out)
        assert sorted(found["whole"]) == [f"{seed:06d}.png" for seed in range(7)]
        assert len(set(found["whole"].values())) == 7
        assert found["reversed"] == found["split"] == found["apart"] == found["whole"]
        assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / f"whole{k}" / "0" / "grid.png")


def test_samples_come_with_a_grid_and_the_settings_that_made_them(trained, tmp_path):
    assert main(["sample", str(trained), "--seeds", "4-8", "--out", str(tmp_path), *SAMPLING]) == 0
    settings = yaml.safe_load((tmp_path / "sample.yaml").read_text())
    assert settings["seeds"] == "4-8"
    assert settings["sampling"]["num_inference_steps"] == 2
    assert {"micro_batch", "device", "threads", "torch"} <= settings.keys()
    assert len(settings["class_labels"]) == 5
    with Image.open(tmp_path / "000004.png") as image:
        assert image.size == (32, 32)
    small = (2 * 34 + 2, 3 * 34 + 2)  # two columns for five images
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == tuple(side * (800 // max(small)) for side in small)


def test_an_inference_form_draws_the_same_pictures_but_for_rounding_whatever_the_split(trained, tmp_path):
    common = ["--micro-batch", "4", *SAMPLING]
    shown = {}
    for name, extra in {"none": [], "eager": ["eager"], "bf16": ["eager", "--precision", "bf16"]}.items():
        flag = ["--inference", *extra] if extra else []
        assert main(["sample", str(trained), "--seeds", "0-5", "--out", str(tmp_path / name), *common, *flag]) == 0
        settings = yaml.safe_load((tmp_path / name / "sample.yaml").read_text())
        assert settings["inference"] == (extra[0] if extra else "none")
        files = [tmp_path / name / f"{seed:06d}.png" for seed in range(6)]
        shown[name] = np.stack([np.asarray(Image.open(path)).astype(int) for path in files])
    assert abs(shown["eager"] - shown["none"]).max() <= 1
    assert 0 < abs(shown["bf16"] - shown["none"]).mean() < 2
    whole = pictures(tmp_path / "bf16")
    apart = {}
    for seeds in ("5,3", "0-2,4"):
        arguments = ["--inference", "eager", "--precision", "bf16", "--out", str(tmp_path / seeds)]
        assert main(["sample", str(trained), "--seeds", seeds, *common, *arguments]) == 0
        apart |= pictures(tmp_path / seeds)
    assert apart == whole


def test_classes_are_given_by_name_or_number_and_used_in_turn(trained, tmp_path):
    arguments = ["--seeds", "0-4", "--out", str(tmp_path), *SAMPLING]
    names = load_bundle(trained).extra["class_names"]
    assert main(["sample", str(trained), "--classes", "Flags", "2", "Objects", *arguments]) == 0
    flag, thing = names.index("Flags"), names.index("Objects")
    assert yaml.safe_load((tmp_path / "sample.yaml").read_text())["class_labels"] == [flag, 2, thing, flag, 2]
    by_name = pictures(tmp_path)
    again = ["--out", str(tmp_path / "numbers")]
    assert main(["sample", str(trained), "--classes", str(flag), "2", str(thing), *arguments, *again]) == 0
    assert pictures(tmp_path / "numbers") == by_name


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["9"], "class 9 is out of range: this model has classes 0 to 8"),
        (["-1"], "class -1 is out of range: this model has classes 0 to 8"),
        (["Flag"], "this model has no class 'Flag'; did you mean 'Flags'?"),
    ],
)
def test_a_class_that_the_model_does_not_have_is_one_line(refused, trained, tmp_path, classes, said):
    code, line = refused("sample", trained, "--out", tmp_path / "out", f"--classes={classes[0]}", *SAMPLING)
    assert (code, line) == (64, said)
    assert not (tmp_path / "out").exists()


def test_classes_for_a_model_without_any_are_one_line(refused, tmp_path):
    model = create_model("dit-emoji32", depth=1, hidden_size=16, num_heads=2, num_classes=0)
    save_model(tmp_path / "model", model, extra={"objective": {}})
    code, line = refused("sample", tmp_path / "model", "--classes", "0", "--out", tmp_path / "out")
    assert (code, line) == (64, "this model has no classes: leave --classes out")


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("3,7,20-22", [3, 7, 20, 21, 22]), ("5", [5]), (" 1 , 2-2 ", [1, 2]), ("2,1", [2, 1])],
)
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-3", "1,,2", "1.5", "3-1", "1-2-3", "²", "0x1"])
def test_other_seeds_are_refused_in_one_line(refused, tmp_path, text):
    code, line = refused("sample", tmp_path, f"--seeds={text}")
    assert code == 64
    assert line.startswith(f"seeds {text!r}: ")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--micro-batch=0", "micro_batch must be at least 1, got 0"),
        ("--device=tpu", "device 'tpu' is not one of auto, cpu, cuda, cuda:N, mps"),
        ("--sampling.spacing=wide", "wide"),
        ("--sampling.shift=3", "shift"),
        ("--sampling.guidance-scale=-1", "guidance_scale"),
        ("--sampling.guidance-channels=0", "guidance_channels"),
    ],
)
def test_other_settings_that_cannot_be_are_one_line(refused, trained, tmp_path, flag, said):
    code, line = refused("sample", trained, flag, "--out", tmp_path / "out")
    assert code == 64
    assert said in line
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_one_line(refused, trained, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused("sample", trained, "--out", tmp_path / "file") == (
        64,
        f"--out {tmp_path / 'file'} is a file; give a folder",
    )


def test_a_missing_model_and_a_preset_s_name_are_one_line(refused, tmp_path):
    code, line = refused("sample", tmp_path / "none")
    assert code == 65
    assert line.startswith(f"{tmp_path / 'none'} does not exist: expected a folder with model.safetensors")
    for name in ("dit-s-2", "DiT-XL/2"):
        code, line = refused("sample", name)
        assert code == 64
        assert line == f"{name} is a preset, a network without weights; train it first, or give a model folder"


def test_an_unfinished_run_is_one_line(refused, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    code, line = refused("sample", tmp_path)
    assert code == 65
    assert "holds no model" in line


def two_models(folder):
    for name, depth in (("a", 1), ("b", 2)):
        model = create_model("dit-emoji32", depth=depth, hidden_size=16, num_heads=2)
        save_model(folder / name, model, extra={"objective": {}})
    return folder / "a", folder / "b"


def test_the_weights_of_another_model_are_refused(refused, tmp_path):
    one, other = two_models(tmp_path)
    (other / "model.safetensors").replace(one / "model.safetensors")
    code, line = refused("sample", one)
    assert code == 65
    assert "model.safetensors is damaged, or from another save than config.json" in line


def test_a_forged_config_for_the_weights_of_another_model_is_refused_with_a_table(tmp_path, capsys):
    """The one error of several lines: what differs, tensor by tensor, under a first line that says all."""
    one, other = two_models(tmp_path)
    document = json.loads((one / "config.json").read_text())
    document["weights"] = read_record(other / "model.safetensors")._asdict()
    del document["digest"]
    (one / "config.json").write_bytes(seal(document))
    (other / "model.safetensors").replace(one / "model.safetensors")
    assert main(["sample", str(one)]) == 65
    first, *table = capsys.readouterr().err.splitlines()
    assert "holds another model than its config.json says: 0 tensors missing" in first
    assert table
    assert all(line.startswith("  ") for line in table)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b'{"_class_name": "DiTTransformer2DModel"}', "model.safetensors": b""}, "something else than"),
        ({"config.json": b"{", "model.safetensors": b""}, "is no JSON document"),
        ({"model.safetensors": b""}, "has model.safetensors but no config.json"),
        ({}, "holds no model"),
    ],
)
def test_a_folder_of_something_else_is_one_line(refused, tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    code, line = refused("sample", tmp_path)
    assert code == 65
    assert said in line


def test_a_pickle_is_refused_before_it_is_opened(refused, tmp_path):
    (tmp_path / "DiT-XL-2-256x256.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    code, line = refused("sample", tmp_path / "DiT-XL-2-256x256.pt")
    assert code == 65
    assert "may be a pickle" in line


def test_a_model_that_does_not_say_what_it_predicts_is_one_line(refused, tmp_path):
    save_model(tmp_path / "model", create_model("dit-emoji32", depth=1, hidden_size=16, num_heads=2))
    code, line = refused("sample", tmp_path / "model")
    assert code == 65
    assert "does not say what its network predicts" in line


# --- presets and data


@pytest.mark.long
def test_the_table_of_presets_has_every_preset_with_what_is_counted_and_what_is_published(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[2 : 2 + len(PRESETS)]}
    assert list(rows) == list(PRESETS)
    for name, preset in PRESETS.items():
        assert "x".join(map(str, preset.config.sample_size)) in rows[name]
        if preset.published.total is not None:
            assert f" {preset.published.total:,} " in rows[name]
        if preset.published.gmacs is not None:
            assert f" {preset.published.gmacs:.2f} " in rows[name]
            assert "as printed" in rows[name] or "%" in rows[name]
    assert max(len(line) for line in lines) <= 160
    assert any("GMACs: " in line for line in lines)


def test_the_table_of_presets_has_a_line_for_each_that_matches(capsys):
    assert main(["presets", "dit-*-8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["dit-s-8", "dit-b-8", "dit-l-8", "dit-xl-8"]
    assert all(f" {PRESETS[line.split()[0]].published.gmacs:.2f} " in line for line in lines[2:6])


def test_presets_are_chosen_by_a_pattern_and_told_as_json(capsys):
    assert main(["presets", "DiT-*/8", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["dit-s-8", "dit-b-8", "dit-l-8", "dit-xl-8"]
    for row in rows:
        published = PRESETS[row["name"]].published
        assert row["parameters"] == published.total
        assert row["published_gmacs"] == published.gmacs
        assert abs(row["gmacs"] / published.gmacs - 1) < 0.01  # two printed decimals of 0.36


def test_a_pattern_that_matches_nothing_is_one_line(refused):
    code, line = refused("presets", "dit-xl-3")
    assert code == 64
    assert line.startswith("no preset matches 'dit-xl-3'; did you mean 'dit-xl-")


def test_data_check_describes_a_folder_and_names_what_cannot_be_used(tmp_path, capsys):
    folder = folder_of_images(tmp_path / "photos")
    (folder / "cats" / "broken.png").write_bytes(b"no image")
    assert main(["data", "check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "10 images, 1 unusable" in out
    assert "'cats': 5 images" in out
    assert "broken.png" in out


def test_data_check_of_a_missing_folder_is_one_line(refused, tmp_path):
    code, line = refused("data", "check", tmp_path / "none")
    assert code == 65
    assert str(tmp_path / "none") in line


def test_data_build_of_a_wrong_tarball_is_one_line(refused, tmp_path):
    (tmp_path / "x.tgz").write_bytes(b"nothing")
    code, line = refused("data", "build", "emoji64", "--tarball", tmp_path / "x.tgz", "--out", tmp_path / "out")
    assert code == 65
    assert "x.tgz: is neither emoji-datasource-google nor emoji-datasource-twitter" in line
    assert not (tmp_path / "out").exists()


def test_the_flags_of_train_are_the_fields_of_its_config(capsys):
    """Nobody writes a parser: a new field is a new flag."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out

    def names(table, prefix=""):
        for name, value in table.items():
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{name}.")
            else:
                yield f"--{prefix}{name}".replace("_", "-")

    from smalti.training import RunConfig

    missing = [name for name in names(to_dict(RunConfig())) if name not in out]
    assert not missing
