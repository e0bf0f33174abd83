"""A run folder from start to end: what is written, what may change when it is continued, and what may not."""

import json
import math
import os
import signal
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import tiny_config, write_set

import smalti
from smalti.checkpoints import CheckpointStore, RunLock, load_bundle
from smalti.config import from_dict, to_dict
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericError,
    PreemptedError,
    RunLockedError,
    SmaltiError,
)
from smalti.models import config_of
from smalti.sampling import SamplingConfig
from smalti.storage.sealed import seal, unseal
from smalti.training import default_decay, loop
from smalti.training.config import (
    IDENTITY,
    DataConfig,
    GuardConfig,
    OptimizerConfig,
    ParallelConfig,
    QualityConfig,
    RunConfig,
    StoreConfig,
)
from smalti.training.guard import REWINDS
from smalti.training.log import read_log
from smalti.training.status import read_status
from smalti.training.stop import StopRequest
from smalti.workflows.run_folder import load_config
from smalti.workflows.train import train
from smalti.workflows.train_setup import model_config, prepare_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A finished run with previews; tests only look at it."""
    out = tmp_path_factory.mktemp("finished")
    config = tiny_config(out, data, sample_every=4, ema_decay=0.9)
    return config, train(config)


def weights(out):
    return load_bundle(out).model.state_dict()


def contents(folder):
    """Every file of a folder; that of the lock comes and goes with its use."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_folder_holds_settings_log_checkpoints_samples_and_the_model(finished):
    config, result = finished
    here = {p.relative_to(config.out).as_posix() for p in config.out.rglob("*") if "tensorboard" not in p.parts}
    assert {"config.yaml", "resolved.yaml", "log.jsonl", "checkpoints", "samples", "model"} <= here
    assert {"samples/step-0000004.png", "samples/step-0000006.png"} <= here
    assert not [name for name in here if name.endswith(".tmp")]
    assert CheckpointStore(config.out / "checkpoints").steps() == [4, 6]
    assert result.out == config.out


def test_the_log_has_a_line_for_every_interval_and_the_end(finished):
    config, result = finished
    log = read_log(config.out)
    assert [line["step"] for line in log if line["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if line["event"] == "validation"] == [3, 6]
    (baseline,) = [line for line in log if line["event"] == "baseline"]
    assert baseline["linear"] == result.baselines.linear.mean < baseline["constant"] == result.baselines.constant.mean
    assert log[-1]["loss"] == result.validation.mean
    assert log[-1]["strata"] == list(result.validation.strata)
    assert all(line["images_per_second"] > 0 for line in log if line["event"] == "train")


def test_the_finished_model_is_the_average_and_knows_what_sampling_needs(finished):
    config, result = finished
    stored = CheckpointStore(config.out / "checkpoints").load(6)
    assert equal(weights(config.out), stored.tensors["ema"])
    assert equal(weights(config.out), result.model.state_dict())
    assert not equal(stored.tensors["ema"], stored.tensors["model"])
    extra = load_bundle(config.out).extra
    assert from_dict(ObjectiveConfig, extra["objective"]) == config.objective
    assert len(extra["class_names"]) == 9
    assert extra["trained"]["steps"] == 6
    assert (
        smalti.load_model(config.out)(torch.zeros(1, 3, 32, 32), torch.tensor([10.0]), torch.tensor([0])).shape[0] == 1
    )


def test_a_preview_shows_four_images_of_every_class(finished):
    config, _ = finished
    small = (4 * 34 + 2, 9 * 34 + 2)
    with Image.open(config.out / "samples" / "step-0000006.png") as sheet:
        assert sheet.size == tuple(side * (800 // max(small)) for side in small)


def test_the_same_call_on_a_finished_run_trains_no_step_and_gives_the_same_result(finished):
    config, result = finished
    before = (config.out / "log.jsonl").read_bytes()
    again = train(config, on_step=lambda report: pytest.fail(f"step {report.step}"))
    assert equal(again.model.state_dict(), result.model.state_dict())
    assert again.validation == result.validation
    assert (config.out / "log.jsonl").read_bytes() == before


def test_the_same_settings_give_the_same_bits_elsewhere_and_another_seed_others(finished, tmp_path):
    config, result = finished
    twin = train(replace(config, out=tmp_path / "twin", sample_every=0, validate_every=0, log_every=0))
    assert equal(twin.model.state_dict(), result.model.state_dict())
    other = train(replace(config, out=tmp_path / "other", sample_every=0, seed=1))
    assert not equal(other.model.state_dict(), result.model.state_dict())


def test_interval_0_means_never_but_a_finished_run_is_always_stored(data, tmp_path):
    quiet = dict.fromkeys(["log_every", "validate_every", "sample_every", "checkpoint_every"], 0)
    result = train(tiny_config(tmp_path, data, **quiet))
    assert [line["event"] for line in read_log(tmp_path)] == ["baseline"]
    assert not (tmp_path / "samples").exists()
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [6]  # or the same command would train again
    assert math.isfinite(result.validation.mean)


def test_labels_can_be_left_out(data, tmp_path):
    config = tiny_config(tmp_path, data)
    result = train(replace(config, override=(*config.override, "num_classes=0")))
    assert config_of(result.model).num_classes == 0
    assert math.isfinite(result.validation.mean)


@pytest.mark.faults
def test_changed_settings_that_make_no_other_run_are_noted(data, tmp_path, capsys):
    config = tiny_config(tmp_path, data)
    train(config)
    train(replace(config, micro_batch=1))
    assert "micro_batch: None -> 1" in capsys.readouterr().err
    assert [line["changed"] for line in read_log(tmp_path) if line["event"] == "settings"] == [
        ["micro_batch: None -> 1"]
    ]


def test_without_held_out_images_there_is_no_validation(data, tmp_path):
    config = tiny_config(tmp_path, data)
    result = train(replace(config, data=replace(config.data, validation_fraction=0.0)))
    assert result.validation is None
    assert result.baselines is None
    assert {line["event"] for line in read_log(tmp_path)} == {"train"}


# --- settings in files


def everything_changed(tmp_path):
    return RunConfig(
        out=tmp_path / "elsewhere",
        model="dit-s-4",
        override=("depth=3", "in_channels=3"),
        data=DataConfig(path="emoji64", image_size=16, flip=True, class_balanced=True, skip_unreadable=True),
        objective=ObjectiveConfig(schedule="flow", prediction="velocity", timestep_sampling="logit_normal"),
        optimizer=OptimizerConfig(
            learning_rate=3e-5, betas=(0.8, 0.9), weight_decay=0.1, warmup_steps=3, clip_norm=2.0
        ),
        steps=5,
        batch_size=9,
        micro_batch=4,
        precision="bf16",
        stochastic_depth=0.1,
        ema_decay=0.5,
        seed=7,
        device="cpu",
        log_every=2,
        validate_every=3,
        sample_every=4,
        checkpoint_every=5,
        keep_checkpoints=6,
        preview=SamplingConfig(sampler="ddim", num_inference_steps=7, eta=0.5, guidance_interval=(0.1, 0.9)),
        store=StoreConfig(keep_every=3, keep_best=True, wait=True, mirror="memory://runs"),
        guard=GuardConfig(skip_budget=5, spike_factor=9.0, spike_floor=0.5, on_spike="rewind"),
        parallel=ParallelConfig(strategy="hsdp", shard_size=2, activation_checkpointing="full", timeout_minutes=0.5),
        quality=QualityConfig(every=7, images=9, metrics=("fid", "kid"), features="lite0@96", reference_images=11),
    )


@pytest.mark.parametrize("changed", [False, True])
def test_settings_survive_yaml(tmp_path, changed):
    config = everything_changed(tmp_path) if changed else RunConfig()
    if changed:
        assert all(getattr(config, f.name) != getattr(RunConfig(), f.name) for f in fields(RunConfig))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert load_config(path) == config


def test_a_run_writes_the_settings_it_used(finished):
    config, _ = finished
    assert load_config(config.out / "config.yaml") == config
    resolved = yaml.safe_load((config.out / "resolved.yaml").read_text())
    assert resolved["model"]["hidden_size"] == 16
    assert resolved["data"]["name"] == "tiny"
    assert len(resolved["data"]["fingerprint"]) == 64


def test_an_empty_file_means_the_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    assert load_config(tmp_path / "run.yaml") == RunConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("setps: 3", "unknown setting 'setps'; did you mean 'steps'?"),
        ("optimizer: {learning_rat: 1.0}", "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("optimizer: {learning_rate: 1e-4}", "YAML reads 1e-4 as text: write 1.0e-4"),
        ("steps: many", "steps: expected int, got 'many'"),
        ("steps: 0", "steps must be at least 1, got 0"),
        ("precision: fp16", "precision: got 'fp16'"),
        ("micro_batch: 65", "micro_batch 65 must be between 1 and batch_size 64"),
        ("ema_decay: 1.0", r"ema_decay must be in \[0, 1\), got 1.0"),
        ("sample_every: -1", "sample_every must be 0"),
        ("- steps", "expected a table of settings"),
        ("steps: [", "cannot be read as YAML"),
        ("a: \x00", "cannot be read as YAML"),
    ],
)
def test_a_file_with_something_wrong_in_it_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_no_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; give the path of a YAML file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "run.yaml")


# --- continuing


CHANGES = {
    "model": "dit-s-8",
    "override": ("depth=1", "hidden_size=16", "num_heads=4"),
    "data": DataConfig(validation_fraction=0.25),
    "objective": ObjectiveConfig(prediction="v"),
    "optimizer": OptimizerConfig(learning_rate=2e-4),
    "batch_size": 16,
    "seed": 1,
    "stochastic_depth": 0.1,
    "ema_decay": None,
    "guard": GuardConfig(spike_factor=10.0),
}


@pytest.mark.faults
def test_every_setting_of_the_identity_has_a_test():
    assert set(CHANGES) == set(IDENTITY)


@pytest.mark.faults
@pytest.mark.parametrize("name", CHANGES)
def test_another_run_in_the_same_folder_is_refused_by_the_name_of_the_setting(finished, name):
    config, _ = finished
    value = replace(CHANGES[name], path=config.data.path) if name == "data" else CHANGES[name]
    before = contents(config.out)
    with pytest.raises(ConfigError, match=rf"holds another run \({name}\b") as caught:
        train(replace(config, **{name: value}))
    assert "\n" not in str(caught.value)
    assert "choose another --out" in str(caught.value)
    assert contents(config.out) == before
    assert read_status(config.out).kind == "finished"


REFUSALS = {  # what else a start may ask for or find, and what is said
    "no data": "neither an image set",
    "no measure": "store.keep_best goes by the validation loss",
    "no such mirror": "nowhere",
    "newer checkpoint": "version 3, written by smalti 9.9",
    "damaged rewinds": "rewinds.json is damaged",
}


@pytest.mark.faults
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_start_leaves_a_finished_run_as_it_was(finished, name):
    config, _ = finished
    images, rewinds = Path(config.data.path), config.out / REWINDS
    manifest = config.out / "checkpoints" / "step-0000000006" / "manifest.json"
    kept, asked = manifest.read_bytes(), replace(config, steps=9)
    try:
        if name == "no data":
            images.rename(images.with_name("hidden"))
        elif name == "no measure":
            asked = replace(asked, store=StoreConfig(keep_best=True), validate_every=0)
        elif name == "no such mirror":
            asked = replace(asked, store=StoreConfig(mirror="nowhere://runs"))
        elif name == "newer checkpoint":
            manifest.write_bytes(seal(unseal(kept, "") | {"version": 3, "smalti": "9.9"}))
        else:
            rewinds.write_text("{")
        before = contents(config.out)
        with pytest.raises(SmaltiError, match=REFUSALS[name]):
            train(asked)
        assert contents(config.out) == before
    finally:
        manifest.write_bytes(kept)
        rewinds.unlink(missing_ok=True)
        if name == "no data":
            images.with_name("hidden").rename(images)
    assert read_status(config.out).kind == "finished"


@pytest.mark.faults
def test_changed_images_are_refused(tmp_path, data):
    folder = write_set(tmp_path / "set")
    config = tiny_config(tmp_path / "run", folder, steps=2)
    train(config)
    write_set(folder, first=1)
    with pytest.raises(CheckpointError, match="was trained on other examples than") as caught:
        train(config)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_more_steps_continue_a_finished_run_and_the_bits_are_those_of_a_longer_one(tmp_path, data):
    """With a decay of its own: the default follows the length of the run."""
    config = tiny_config(tmp_path / "short", data, steps=3, checkpoint_every=0, ema_decay=0.9)
    train(replace(config, checkpoint_every=3))
    seen = []
    longer = train(replace(config, steps=6), on_step=lambda report: seen.append(report.step))
    assert seen == [4, 5, 6]
    whole = train(replace(config, out=tmp_path / "long", steps=6))
    assert equal(longer.model.state_dict(), whole.model.state_dict())
    assert [line["step"] for line in read_log(config.out) if line["event"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.faults
def test_how_often_something_is_written_may_change(tmp_path, data):
    config = tiny_config(tmp_path, data, steps=2)
    train(config)
    train(replace(config, steps=4, log_every=2, validate_every=0, checkpoint_every=4, keep_checkpoints=1))
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [4]


@pytest.mark.faults
def test_a_second_writer_is_refused_and_changes_nothing(finished):
    config, _ = finished
    before = {p: p.read_bytes() for p in config.out.rglob("*") if p.is_file() and p.name != ".lock"}
    with RunLock(config.out), pytest.raises(RunLockedError, match=f"process {os.getpid()} on") as caught:
        train(replace(config, steps=9))
    assert caught.value.exit_code == 73
    assert {p: p.read_bytes() for p in config.out.rglob("*") if p.is_file() and p.name != ".lock"} == before


@pytest.mark.faults
def test_a_damaged_newest_checkpoint_is_passed_over_by_name(tmp_path, data, capsys):
    config = tiny_config(tmp_path, data)
    whole = train(config)
    (newest,) = (tmp_path / "checkpoints").glob("step-*6/model.safetensors")
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    seen = []
    again = train(config, on_step=lambda report: seen.append(report.step))
    assert seen == [5, 6]
    assert "passed over" in (said := capsys.readouterr().err)
    assert "step-0000000006" in said
    assert "continuing" in said
    assert equal(again.model.state_dict(), whole.model.state_dict())


def test_checkpoints_of_another_network_are_refused(tmp_path, data):
    config = tiny_config(tmp_path / "run", data, steps=2)
    train(config)
    other = replace(config, out=tmp_path / "other", override=("depth=2", "hidden_size=16", "num_heads=2"))
    train(other)
    (other.out / "checkpoints").rename(tmp_path / "moved")
    (config.out / "checkpoints").rename(other.out / "checkpoints")
    with pytest.raises(ConfigError, match=r"is of another run \(override: ") as caught:
        train(other)
    assert "\n" not in str(caught.value)


# --- stopping and numbers that are not finite


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_the_step_that_was_running_and_says_how_to_go_on(tmp_path, data, name):
    config = tiny_config(tmp_path, data, checkpoint_every=0)

    def signal_at_3(report):
        if report.step == 3:
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(PreemptedError, match=f"stopped by {name} and saved at step 3") as caught:
        train(config, on_step=signal_at_3)
    assert caught.value.exit_code == 75
    assert "the same command continues" in str(caught.value)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [3]
    assert not (tmp_path / "model").exists()


def test_a_signal_during_the_last_step_ends_the_run_as_finished(tmp_path, data):
    config = tiny_config(tmp_path, data, steps=2)
    train(config, on_step=lambda report: report.step == 2 and os.kill(os.getpid(), signal.SIGTERM))
    assert (tmp_path / "model" / "config.json").exists()


def test_a_second_ctrl_c_interrupts_and_other_signals_do_not():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert stop.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_after_the_run_signals_mean_what_they_meant_before():
    before = [signal.getsignal(number) for number in StopRequest.signals]
    with StopRequest():
        assert [signal.getsignal(number) for number in StopRequest.signals] != before
    assert [signal.getsignal(number) for number in StopRequest.signals] == before


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def inside():
        with StopRequest() as stop:
            found.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [(None, signal.getsignal(signal.SIGTERM))]


def nan_losses(monkeypatch, steps):
    real, calls = loop.training_losses, iter(range(10**6))
    monkeypatch.setattr(
        loop,
        "training_losses",
        lambda *a, **k: (r := real(*a, **k))._replace(loss=r.loss * (math.nan if next(calls) in steps else 1.0)),
    )


def test_a_skipped_step_is_logged_and_not_averaged_in(tmp_path, data, monkeypatch):
    nan_losses(monkeypatch, {1, 3})
    train(tiny_config(tmp_path, data, steps=4, log_every=2, checkpoint_every=1, keep_checkpoints=9))
    lines = [line for line in read_log(tmp_path) if line["event"] == "train"]
    assert [(line["step"], line["skipped"]) for line in lines] == [(2, True), (4, True)]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert [line["grad_norm"] for line in lines] == [None, None]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    states = [json.loads(p.read_text()) for p in sorted((tmp_path / "checkpoints").glob("step-*/state.json"))]
    assert [s["skipped"] for s in states] == [[], [1], [1], [1, 3]]


def test_skipped_steps_survive_a_restart(tmp_path, data, monkeypatch):
    nan_losses(monkeypatch, {1})
    config = tiny_config(tmp_path, data, steps=2, ema_decay=0.9)
    train(config)
    monkeypatch.undo()
    train(replace(config, steps=4))
    (newest,) = (tmp_path / "checkpoints").glob("step-*4/state.json")
    kept = json.loads(newest.read_text())
    assert (kept["step"], kept["skipped"]) == (4, [1])


def test_too_many_nan_losses_stop_the_run_and_no_nan_is_ever_stored(tmp_path, data, monkeypatch):
    nan_losses(monkeypatch, set(range(4, 100)))
    config = tiny_config(tmp_path, data, steps=50, checkpoint_every=3)
    with pytest.raises(NumericError, match="11 of the last 1000 steps") as caught:
        train(config)
    assert caught.value.exit_code == 70
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == [9, 12]
    for step in store.steps():
        for group in store.load(step).tensors.values():
            assert all(torch.isfinite(t).all() for t in group.values())
    assert not (tmp_path / "model").exists()


# --- model and data must fit


def test_the_preset_is_fitted_to_the_images(data):
    config = tiny_config(data, data, override=("depth=1", "hidden_size=16", "num_heads=2"), model="dit-s-4")
    run, model = prepare_run(config)
    assert (model.sample_size, model.in_channels, model.num_classes) == ((32, 32), 3, 9)
    assert model.learned_variance
    flow = replace(config, objective=ObjectiveConfig(schedule="flow", prediction="velocity"))
    assert not model_config(flow, run.examples).learned_variance


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("num_classes=3",), "num_classes 3 is less than the 9 classes of the data"),
        (("null_class=false",), "set null_class=true or label_dropout 0"),
        (("hiden_size=16",), "unknown setting 'hiden_size'; did you mean 'hidden_size'?"),
        (("depth=two",), "depth: expected int, got 'two'"),
        (("depth",), "override 'depth' is not of the form name=value"),
        (("patch_size=5",), "cannot be cut into patches of 5"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(data, override, said):
    with pytest.raises(ConfigError, match=said):
        prepare_run(tiny_config(data, data, override=override))


def test_without_null_class_and_without_dropout_a_network_trains(tmp_path, data):
    objective = ObjectiveConfig(label_dropout=0.0)
    config = tiny_config(tmp_path, data, steps=1, objective=objective)
    config = replace(
        config, override=(*config.override, "null_class=false"), preview=replace(config.preview, guidance_scale=1.0)
    )
    train(replace(config, sample_every=1))
    assert (tmp_path / "samples" / "step-0000001.png").exists()


def test_a_folder_without_classes_trains_an_unconditional_network(tmp_path, data):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    for k in range(12):
        noise = torch.randint(0, 256, (16, 16, 3), generator=rng, dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(folder / f"{k}.png")
    config = tiny_config(tmp_path / "run", folder, steps=2, sample_every=2)
    config = replace(config, preview=replace(config.preview, guidance_scale=1.0))
    train(config)
    bundle = load_bundle(tmp_path / "run")
    assert bundle.model.config.num_classes == 0
    assert bundle.extra["class_names"] == []
    assert (tmp_path / "run" / "samples" / "step-0000002.png").exists()


def test_nothing_is_written_before_settings_and_images_are_known_to_fit(tmp_path, data):
    for config, error in (
        (tiny_config(tmp_path / "run", data, override=("depth=0",)), ConfigError),
        (tiny_config(tmp_path / "run", tmp_path / "none"), DataError),
    ):
        with pytest.raises(error):
            train(config)
    assert not (tmp_path / "run").exists()


def test_the_default_decay_follows_the_length_of_the_run(finished, tmp_path, data):
    config, result = finished
    assert result.ema_decay == config.ema_decay == 0.9
    assert train(tiny_config(tmp_path, data, steps=2)).ema_decay == default_decay(2)
