"""`smalti plan`: presets, run files and run folders, and what it prints."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from smalti.cli import main
from smalti.config import to_dict
from smalti.cost import count_macs
from smalti.diffusion import ObjectiveConfig
from smalti.errors import ConfigError
from smalti.presets import preset_config
from smalti.training.config import DataConfig, ParallelConfig, RunConfig
from smalti.workflows.plan import make_plan, plan_request, read_measured
from smalti.workflows.run_folder import CONFIG, RESOLVED

TINY = ("depth=1", "hidden_size=48", "num_heads=2")


def write_run(folder, speeds, **settings):
    folder.mkdir()
    config = RunConfig(model="dit-emoji32", override=TINY, out=folder, **settings)
    network = preset_config("dit-emoji32", depth=1, hidden_size=48, num_heads=2)
    (folder / CONFIG).write_text(yaml.safe_dump(to_dict(config)))
    (folder / RESOLVED).write_text(yaml.safe_dump({"model": to_dict(network), "data": {}}))
    lines = [
        {"event": "train", "step": i, "images_per_second": speed, "processes": 1 if i < 2 else 2}
        for i, speed in enumerate(speeds)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return network


def test_a_preset_alone_is_planned_as_its_paper_trained_it():
    request = plan_request("DiT-XL/2")
    assert request.network == preset_config("dit-xl-2")
    assert (request.batch_size, request.steps, request.precision) == (256, 400_000, "bf16")
    assert (request.strategy, plan_request("dit-xl-2", gpus_per_node=8).strategy) == ("single", "ddp")
    assert plan_request("dit-xl-2", nodes=2, gpus_per_node=8).strategy == "hsdp"


def test_the_size_may_be_that_of_images_or_of_latents():
    assert plan_request("dit-xl-2", image_size=512).network.sample_size == (64, 64)
    assert plan_request("dit-xl-2", image_size=512, factor=16).network.sample_size == (32, 32)
    assert plan_request("dit-xl-2", sample_size=16).network.sample_size == (16, 16)
    with pytest.raises(ConfigError, match="once"):
        plan_request("dit-xl-2", sample_size=16, image_size=128)
    with pytest.raises(ConfigError, match="not divisible"):
        plan_request("dit-xl-2", image_size=100)


def test_a_run_gives_the_defaults_and_flags_change_them():
    parallel = ParallelConfig(strategy="hsdp", shard_size=2, activation_checkpointing="full", reshard=False)
    run = RunConfig(model="dit-emoji32", override=TINY, batch_size=32, micro_batch=2, steps=7, parallel=parallel)
    request = plan_request(run=run, gpus_per_node=8)
    assert request.network.depth == 1
    assert (request.batch_size, request.micro_batch, request.steps, request.precision) == (32, 2, 7, "fp32")
    assert (request.strategy, request.shard_size, request.reshard) == ("hsdp", 2, False)
    assert request.activation_checkpointing == "full"
    flags = {"strategy": "ddp", "batch_size": 64, "precision": "bf16", "override": ("depth=3",)}
    changed = plan_request(run=run, gpus_per_node=8, **flags)
    assert (changed.strategy, changed.shard_size, changed.batch_size) == ("ddp", None, 64)
    assert (changed.precision, changed.network.depth) == ("bf16", 3)


def test_a_run_on_pixels_is_planned_at_the_size_of_its_images():
    run = RunConfig(model="dit-emoji32", data=DataConfig(path="photos", image_size=64))
    assert plan_request(run=run).network.sample_size == (64, 64)
    assert plan_request(run=run, sample_size=16).network.sample_size == (16, 16)
    flow = RunConfig(model="dit-s-2", objective=ObjectiveConfig(schedule="flow", prediction="velocity"))
    assert not plan_request(run=flow).network.learned_variance


def test_a_run_on_latents_is_planned_at_their_size(tmp_path, monkeypatch):
    (tmp_path / "latents.json").write_text("{}")
    record = SimpleNamespace(identity=SimpleNamespace(latent_shape=(4, 8, 6)), class_names=("a", "b"))
    monkeypatch.setattr("smalti.workflows.plan.read_record", lambda store: record)
    run = RunConfig(data=DataConfig(path=str(tmp_path)), override=("patch_size=1",))
    network = plan_request(run=run).network
    assert (network.in_channels, network.sample_size, network.num_classes) == (4, (8, 6), 2)
    assert plan_request(run=run, sample_size=16).network.sample_size == (16, 16)


def test_nothing_to_plan_is_said():
    with pytest.raises(ConfigError, match="name a preset"):
        plan_request()


def test_a_run_folder_tells_its_speed_without_its_first_stretches(tmp_path):
    network = write_run(tmp_path / "run", [1, 2, 3, 4, *range(100, 111)], precision="bf16")
    told = read_measured(tmp_path / "run", "4090")
    assert (told.low, told.images_per_second, told.high) == (101, 105, 109)
    assert (told.network, told.device, told.precision, told.devices) == (network, "4090", "bf16", 2)
    request = plan_request("dit-emoji32", override=TINY, measured=tmp_path / "run", device="4090", batch_size=8)
    made = make_plan(request)
    assert made.calibration == f"measured on 2 x 4090, {tmp_path / 'run'}"
    assert made.paces[1].images_per_second == pytest.approx(105 / 2)  # on one device
    assert not made.notes


def test_a_json_file_tells_speed_and_device(tmp_path):
    file = tmp_path / "speed.json"
    speed = 0.3 * 312e12 / (6 * count_macs(preset_config("dit-s-2")).total)
    file.write_text(json.dumps({"images_per_second": speed, "device": "a100-80"}))
    made = make_plan(plan_request("dit-s-2", measured=file, device="a100-80", batch_size=8))
    assert [p.utilisation for p in made.paces] == pytest.approx([0.27, 0.3, 0.33])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ('{"images_per_second": -3, "device": "h100"}', "above 0"),
        ('{"images_per_second": 3, "devise": "h100"}', "devise"),
        ('{"device": "h100"}', "images_per_second"),
        ("[3]", "expected a table"),
    ],
)
def test_a_file_without_a_speed_is_refused(tmp_path, content, words):
    (tmp_path / "speed.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_measured(tmp_path / "speed.json", "h100")


def test_a_folder_without_a_speed_is_refused(tmp_path):
    write_run(tmp_path / "run", [])
    with pytest.raises(ConfigError, match="no line with images_per_second"):
        read_measured(tmp_path / "run", "h100")
    with pytest.raises(ConfigError, match="does not exist"):
        read_measured(Path("nowhere"), "h100")


def test_the_command_prints_a_table_that_names_what_is_assumed(capsys):
    assert main(["plan", "dit-emoji32", "--device", "h200", "--batch-size", "64", "--steps", "100"]) == 0
    text = capsys.readouterr().out
    for words in ("parameters", "worst moment", "utilisation assumed", "checkpoint", "50,000 samples", "Fits: yes"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 140


def test_the_command_plans_several_nodes_with_prices_as_json(capsys):
    world = ["--nodes", "2", "--gpus-per-node", "4", "--strategy", "hsdp", "--shard-size", "4"]
    flags = ["--price-per-hour", "2.5", "--activation-checkpointing", "selective", "--json"]
    assert main(["plan", "dit-emoji32", *world, *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["communication"]["between"] > 0
    assert told["paces"][0]["cost"] == pytest.approx(2.5 * told["paces"][0]["device_hours"])
    assert told["request"]["shard_size"] == 4


def test_the_command_takes_the_settings_of_a_run(tmp_path, capsys):
    write_run(tmp_path / "run", [5.0])
    assert main(["plan", "--config", str(tmp_path / "run" / CONFIG), "--device", "4090"]) == 0
    text = capsys.readouterr().out
    assert "dit-emoji32" in text
    assert "10,000 steps of 64 images, fp32" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["dit-xl-3"], "no preset"),
        (["dit-s-2", "--device", "h300"], "h200"),
        (["dit-s-2", "--strategy", "ddp", "--gpus-per-node", "512"], "less than one image"),
        (["dit-s-2", "--sample-size", "7"], "patches"),
        ([], "name a preset"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags, words, capsys):
    assert main(["plan", *flags]) == 64
    captured = capsys.readouterr()
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
