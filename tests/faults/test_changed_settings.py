"""Every setting of a run, changed when the run is started again: refused by name, or allowed and written down."""

from dataclasses import replace

import pytest
import yaml
from tiny_runs import tiny_config, write_set

from smalti.config import from_dict, to_dict
from smalti.errors import CheckpointError, ConfigError
from smalti.sampling import SamplingConfig
from smalti.training.config import RunConfig
from smalti.workflows.run_folder import CONFIG, RESOLVED, check_config, write_config
from smalti.workflows.train_setup import prepare_run

# What a run is: other samples, noise or weights would follow from these.
REFUSED = {
    "model": "dit-s-4",
    "override": ["depth=2", "hidden_size=16", "num_heads=2"],
    "data.path": "emoji32",
    "data.image_size": 16,
    "data.flip": True,
    "data.class_balanced": True,
    "data.skip_unreadable": True,
    "data.validation_fraction": 0.25,
    "data.posterior": "mean",
    "data.shuffle": "blocks",
    "data.shuffle_window": 4,
    "objective.schedule": "cosine",
    "objective.num_train_timesteps": 500,
    "objective.prediction": "v",
    "objective.timestep_sampling": "logit_normal",
    "objective.logit_mean": 0.5,
    "objective.logit_std": 2.0,
    "objective.loss_weighting": "min_snr",
    "objective.min_snr_gamma": 2.0,
    "objective.variational_weight": 0.5,
    "objective.label_dropout": 0.2,
    "objective.label_drop": "independent",
    "optimizer.learning_rate": 2e-4,
    "optimizer.betas": [0.8, 0.999],
    "optimizer.weight_decay": 0.1,
    "optimizer.warmup_steps": 3,
    "optimizer.decay": "cosine",
    "optimizer.clip_norm": 1.0,
    "batch_size": 16,
    "stochastic_depth": 0.1,
    "ema_decay": 0.9,
    "seed": 1,
    "guard.skip_budget": 3,
    "guard.spike_factor": 9.0,
    "guard.spike_floor": 0.5,
    "guard.on_spike": "rewind",
}
# How long it goes, where and how fast it is computed, and what is told and kept of it.
NOTED = {
    "data.workers": 2,
    "steps": 7,
    "micro_batch": 4,
    "precision": "bf16",
    "device": "cuda:0",
    "log_every": 2,
    "validate_every": 4,
    "sample_every": 5,
    "checkpoint_every": 3,
    "keep_checkpoints": 3,
    "preview.sampler": "heun",
    "preview.num_inference_steps": 3,
    "preview.spacing": "linspace",
    "preview.shift": 2.0,
    "preview.guidance_scale": 3.0,
    "preview.guidance_interval": [0.1, 0.9],
    "preview.guidance_channels": 3,
    "preview.eta": 0.5,
    "preview.fixed_variance": "small",
    "preview.clip_x0": True,
    "store.keep_every": 4,
    "store.keep_best": True,
    "store.wait": True,
    "store.mirror": "memory://runs",
    "parallel.strategy": "ddp",
    "parallel.shard_size": 2,
    "parallel.reshard": False,
    "parallel.activation_checkpointing": "full",
    "parallel.compile": True,
    "parallel.timeout_minutes": 5.0,
    "quality.every": 3,
    "quality.images": 10,
    "quality.metrics": ["fid"],
    "quality.features": "lite0",
    "quality.reference_images": 50,
    "quality.reference": "emoji32",
}

pytestmark = pytest.mark.faults


def leaves(settings, prefix=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def changed(config, name, value):
    """The settings with one of them changed, and whatever else that one needs."""
    settings = to_dict(config)
    place = settings
    *parents, leaf = name.split(".")
    for parent in parents:
        place = place[parent]
    assert place[leaf] != value, "this changes nothing"
    place[leaf] = value
    if name == "parallel.shard_size":
        place["strategy"] = "hsdp"
    return from_dict(RunConfig, settings)


def settle(config, catalogue, model):
    """What a start does that is not refused."""
    said = check_config(config, catalogue)
    write_config(config, catalogue, model)
    return said


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(settings, catalogue, network) of a run whose folder has been settled."""
    folder = tmp_path_factory.mktemp("settings")
    preview = SamplingConfig(sampler="ddim", num_inference_steps=2)
    config = tiny_config(folder / "run", write_set(folder / "set"), preview=preview)
    config.out.mkdir()
    run, model = prepare_run(config)
    assert settle(config, run.catalogue, model) == []
    return config, run.catalogue, model


@pytest.fixture(autouse=True)
def _as_it_was(started):
    files = [started[0].out / name for name in (CONFIG, RESOLVED)]
    before = [file.read_bytes() for file in files]
    yield
    for file, content in zip(files, before, strict=True):
        file.write_bytes(content)


def test_every_setting_has_its_place_in_the_matrix():
    assert REFUSED.keys() & NOTED.keys() == set()
    assert {*REFUSED, *NOTED, "out"} == set(leaves(to_dict(RunConfig())))


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_makes_another_run_is_refused_by_name_and_nothing_is_written(started, name):
    config, catalogue, model = started
    before = {path: path.read_bytes() for path in config.out.iterdir()}
    with pytest.raises(ConfigError, match=rf"holds another run \({name.split('.')[0]}\b") as caught:
        settle(changed(config, name, REFUSED[name]), catalogue, model)
    assert caught.value.exit_code == 64
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in config.out.iterdir()} == before


@pytest.mark.parametrize("name", NOTED)
def test_a_setting_that_does_not_is_allowed_named_and_written_down(started, name):
    config, catalogue, model = started
    other = changed(config, name, NOTED[name])
    (said,) = [line for line in settle(other, catalogue, model) if line.startswith(f"{name}:")]
    assert str(NOTED[name]) in said
    assert from_dict(RunConfig, yaml.safe_load((config.out / CONFIG).read_text())) == other
    assert settle(other, catalogue, model) == []  # and is what the next start compares with


def test_the_same_settings_say_nothing_and_a_moved_folder_is_the_same_run(started):
    config, catalogue, model = started
    assert settle(config, catalogue, model) == []
    (config.out.parent / "link").symlink_to(config.out)
    assert settle(replace(config, out=config.out.parent / "link"), catalogue, model) == []


def test_two_changes_are_both_named(started):
    config, catalogue, model = started
    both = changed(changed(config, "seed", 1), "batch_size", 16)
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1") as caught:
        settle(both, catalogue, model)
    assert "batch_size: 8 -> 16" in str(caught.value)


def test_other_examples_under_the_same_name_are_refused(started):
    config, catalogue, model = started
    with pytest.raises(CheckpointError, match="trained on other examples than") as caught:
        settle(config, replace(catalogue, fingerprint="1" * 64), model)
    assert caught.value.exit_code == 65
