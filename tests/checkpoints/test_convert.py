"""`smalti convert` as a user types it: one line in, two lines out, and nothing written that does not fit."""

import argparse
import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import smalti
from smalti.checkpoints import MAPS, load_bundle, official_shapes, to_official
from smalti.cli import main
from smalti.errors import ConfigError
from smalti.presets import PRESETS, create_model, preset_config
from smalti.workflows import convert as workflow

SOURCE = "facebookresearch/DiT"
TINY = {"hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "sample_size": 8}
RELEASED = {"input_size": 8, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "patch_size": 2}
SET = [f"{k}={v}" for k, v in (RELEASED | {"in_channels": 4, "mlp_ratio": 4.0, "learn_sigma": True}).items()]
SET.append("class_dropout_prob=0.1")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network(seed=0):
    model = create_model("dit-s-2", **TINY)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "position":
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def same(a, b):
    return a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def run(capsys, *arguments):
    code = main(["convert", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def here():
    return sorted(p.name for p in Path.cwd().iterdir())


@pytest.fixture
def released(tmp_path):
    save_file(to_official(network()), tmp_path / "w.safetensors")
    return Path("w.safetensors")


@pytest.fixture
def trained(tmp_path):
    """A training checkpoint of released code."""
    args = argparse.Namespace(model="DiT-S/2", image_size=64, num_classes=5, epochs=3)
    weights, average = to_official(network()), to_official(network(1))
    torch.save({"model": weights, "ema": average, "opt": {}, "args": args}, tmp_path / "0400000.pt")
    return Path("0400000.pt")


def test_hyperparameters_by_hand_give_a_folder_that_is_ready_to_use(released, capsys):
    code, lines, err = run(capsys, SOURCE, released, "--out", "out", "--set", *SET)
    assert (code, err) == (0, "")
    assert len(lines) == 2
    assert lines[0].startswith(f"read w.safetensors: its weights ({len(to_official(network()))} tensors) as DiT with")
    assert lines[1].startswith("wrote out: model.safetensors (")
    bundle = load_bundle(Path("out"))
    assert same(bundle.model, network())
    assert bundle.extra["converted_from"] == {"source": SOURCE, "file": "w.safetensors", "weights": "plain"}
    assert same(smalti.from_pretrained("out"), network())
    assert here() == ["out", "w.safetensors"]


def test_what_was_converted_can_be_sampled(released, capsys):
    save_file(to_official(create_model("dit-s-2", **(TINY | {"in_channels": 3}))), "w.safetensors")
    settings = [pair for pair in SET if not pair.startswith("in_channels")]
    assert run(capsys, SOURCE, released, "--out", "out", "--set", *settings, "in_channels=3")[0] == 0
    steps = ["--sampling.num-inference-steps", "1", "--seeds", "0", "--device", "cpu"]
    assert main(["sample", "out", "--out", "pictures", *steps]) == 0
    assert Path("pictures/grid.png").exists()


@pytest.mark.faults
@pytest.mark.parametrize(("weights", "seed"), [("auto", 1), ("ema", 1), ("model", 0)])
def test_a_training_checkpoint_says_itself_what_it_is(trained, capsys, weights, seed, monkeypatch):
    # The preset is made small, so that the file's own name for it leads to this network.
    small = preset_config("dit-s-2", hidden_size=24, depth=2, num_heads=3)
    row = PRESETS["dit-s-2"]
    monkeypatch.setitem(workflow.PRESETS, "dit-s-2", type(row)(row.name, row.title, small, row.source, row.published))
    code, lines, _ = run(capsys, "dit", trained, "--weights", weights)
    assert code == 0
    assert "settings from the file (DiT-S/2)" in lines[0]
    assert ("'ema'" if seed else "'model'") in lines[0]
    assert same(smalti.from_pretrained("0400000-smalti"), network(seed))


def test_one_short_line_is_enough_for_a_released_file(capsys):
    torch.save(to_official(create_model("dit-s-8")), "DiT-S-8-256x256.pt")
    code, lines, _ = run(capsys, "DiT", "DiT-S-8-256x256.pt")
    assert code == 0
    assert "settings from preset dit-s-8, whose shapes these are" in lines[0]
    assert load_bundle(Path("DiT-S-8-256x256-smalti")).model.config == PRESETS["dit-s-8"].config


@pytest.mark.faults
def test_there_and_back_gives_the_same_bits(released, capsys):
    assert run(capsys, SOURCE, released, "--out", "ours", "--set", *SET)[0] == 0
    code, lines, _ = run(capsys, "smalti", "ours", "--to", "official", "--out", "back.safetensors")
    assert code == 0
    assert "for input_size=8, patch_size=2, in_channels=4, hidden_size=24, depth=2" in lines[1]
    back, before = load_file("back.safetensors"), load_file("w.safetensors")
    assert back.keys() == before.keys()
    assert all(torch.equal(back[k], v) for k, v in before.items())
    code, lines, _ = run(capsys, "smalti", "ours", "--to", "diffusers")
    assert code == 0
    assert "downscale_freq_shift = 0" in lines[2]
    assert sorted(p.name for p in Path("ours-diffusers").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert run(capsys, "diffusers", "ours-diffusers", "--out", "again")[0] == 0
    assert same(smalti.from_pretrained("again"), network())
    assert run(capsys, SOURCE, released, "--to", "diffusers", "--out", "straight", "--set", *SET)[0] == 0
    assert Path("straight/config.json").read_bytes() == Path("ours-diffusers/config.json").read_bytes()


def test_names_left_by_a_training_wrapper_are_taken_off(capsys):
    save_file({f"module._orig_mod.{k}": v for k, v in to_official(network()).items()}, "w.safetensors")
    assert run(capsys, SOURCE, "w.safetensors", "--out", "out", "--set", *SET)[0] == 0
    assert same(smalti.from_pretrained("out"), network())


# --- what does not fit


@pytest.mark.faults
@pytest.mark.parametrize(
    "change", ["hidden_size=48", "depth=3", "num_classes=6", "input_size=16", "in_channels=3", "learn_sigma=false"]
)
def test_wrong_hyperparameters_are_a_table_with_exit_65_and_nothing_is_written(released, capsys, change):
    settings = [pair for pair in SET if pair.partition("=")[0] != change.partition("=")[0]]
    code, out, err = run(capsys, SOURCE, released, "--out", "out", "--set", *settings, change)
    assert (code, out) == (65, [])
    assert "tensors missing" in err
    assert here() == ["w.safetensors"]


@pytest.mark.faults
def test_weights_of_no_preset_are_shown_beside_the_nearest(released, capsys):
    code, out, err = run(capsys, SOURCE, released)
    assert (code, out) == (65, [])
    assert "has the shapes of no preset of facebookresearch/DiT" in err
    assert "beside dit-" in err
    assert here() == ["w.safetensors"]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["facebook/DiT", "w.safetensors"], 64, "nothing that can be converted; did you mean 'facebookresearch/DiT'"),
        ([SOURCE, "nothing.pt"], 65, "cannot be read"),
        ([SOURCE, "w.safetensors", "--preset", "dit-s-3"], 64, "no preset 'dit-s-3'"),
        ([SOURCE, "w.safetensors", "--set", "hiden_size=3"], 64, "did you mean 'hidden_size'"),
        ([SOURCE, "w.safetensors", "--set", "hidden_size"], 64, "not of the form name=value"),
        ([SOURCE, "w.safetensors", "--weights", "ema"], 65, "plain weights only"),
        ([SOURCE, "w.safetensors", "--to", "official", "--out", "w.pt"], 64, "one .safetensors file"),
        ([SOURCE, "w.safetensors", "--out", "w.safetensors"], 64, "exists"),
        (["smalti", "w.safetensors", "--to", "diffusers"], 65, "give the folder"),
        (["smalti", "ours"], 64, "already"),
        (["diffusers", "ours", "--preset", "dit-s-2"], 64, "--preset has no meaning"),
        (["smalti", "ours", "--to", "official", "--set", "depth=3"], 64, "--set depth has no meaning"),
        (["diffusers", "ours"], 65, "has no config.json"),
        (["diffusers", "ours", "--set", "timestep_frequencies=3"], 64, "expected half_open or closed"),
    ],
)
def test_whatever_is_wrong_is_one_line_with_its_exit_code_and_nothing_is_written(
    released, capsys, arguments, code, message
):
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, [])
    assert message in err
    assert len(err.splitlines()) == 1
    assert here() == ["w.safetensors"]


def test_a_network_that_was_never_released_stays_ours(capsys):
    create_model("dit-s-2", **TINY, conditioning="cross_attention").save_pretrained("ours")
    for form, message in (("official", "never released"), ("diffusers", "cannot express conditioning")):
        code, out, err = run(capsys, "smalti", "ours", "--to", form)
        assert (code, out) == (64, [])
        assert message in err
    assert here() == ["ours"]


@pytest.mark.faults
def test_a_disk_that_fills_up_leaves_nothing_behind(released, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    model = network()
    model.save_pretrained("ours")
    monkeypatch.setattr(workflow, "write_file", full)
    for arguments in (["--to", "diffusers"], ["--to", "official"]):
        code, out, err = run(capsys, "smalti", "ours", *arguments)
        assert (code, out) == (74, [])
        assert "Nothing was written" in err
    assert here() == ["ours", "w.safetensors"]


# --- the tables


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("source", MAPS)
def test_every_source_tells_the_hyperparameters_of_the_presets_it_released(source, all_of_them):
    origin = MAPS[source]
    rows = [row for row in PRESETS.values() if row.config.kind == origin.kind and not origin.unreleased(row.config)]
    for row in rows if all_of_them else rows[:1]:
        with contextlib.suppress(ConfigError):  # networks whose tensors the released code has no names for
            model = create_model(row.name, device="meta")
            expected = {name: tuple(tensor.shape) for name, tensor in to_official(model, source).items()}
            assert official_shapes(source, **origin.released(row.config)) == expected, row.name


def test_the_guide_names_every_source():
    page = (Path(__file__).parents[2] / "docs" / "guide" / "convert.md").read_text()
    assert [source for source in MAPS if source not in page] == []
