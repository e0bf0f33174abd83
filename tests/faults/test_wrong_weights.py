"""Weights of another network, for each of the four: refused with a table, exit 65, and not one of them loaded."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import scramble

from smalti.checkpoints import load_tensors, to_official
from smalti.cli import main
from smalti.errors import CheckpointError
from smalti.presets import create_model

RIGHT = {
    "dit-emoji32": {"depth": 2, "hidden_size": 24, "num_heads": 2},
    "diffussm-emoji32": {"depth": 2, "hidden_size": 24},
    "drwkv-emoji32": {"depth": 3, "hidden_size": 32},
    "udit-emoji32": {"hidden_size": 16, "num_heads": 2},
}
WRONG = ("preset", "size", "classes")

pytestmark = pytest.mark.faults


def network(name, seed=0, **changes):
    model = create_model(name, **({"sample_size": 16, "num_classes": 5} | RIGHT[name] | changes))
    scramble(model, seed)
    return model


def wrong_weights(name, kind):
    other = list(RIGHT)[list(RIGHT).index(name) - 1]
    made = {
        "preset": lambda: network(other),
        "size": lambda: network(name, hidden_size=2 * RIGHT[name]["hidden_size"]),
        "classes": lambda: network(name, num_classes=7),
    }
    return made[kind]().state_dict()


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", RIGHT)
def test_weights_of_another_network_are_refused_with_a_table_and_none_is_loaded(name, kind):
    model = network(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="holds another model than the") as caught:
        load_tensors(model, wrong_weights(name, kind), "step-7")
    assert caught.value.exit_code == 65
    lines = str(caught.value).splitlines()
    assert 1 < len(lines) <= 28
    assert "missing" in lines[0]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", RIGHT)
def test_weights_of_the_same_network_are_accepted_whatever_they_were_before(name):
    model, other = network(name, 1), network(name, 2)
    load_tensors(model, other.state_dict(), "step-7")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A training checkpoint of released code that has no average."""
    monkeypatch.chdir(tmp_path)
    model = network("dit-emoji32", in_channels=4, learned_variance=True, patch_size=2)
    args = argparse.Namespace(model="DiT-S/2", image_size=128, num_classes=5)
    torch.save({"model": to_official(model), "opt": {}, "args": args}, "0001.pt")
    return Path("0001.pt")


SET = "input_size=16 hidden_size=24 depth=2 num_heads=2 num_classes=5 patch_size=2 in_channels=4 mlp_ratio=4.0"


@pytest.mark.parametrize("weights", ["ema", "auto"])
def test_an_average_that_is_not_there_is_refused_when_asked_for_and_named_when_not(released, capsys, weights):
    settings = [*SET.split(), "learn_sigma=true", "class_dropout_prob=0.1"]
    code = main(
        ["convert", "facebookresearch/DiT", str(released), "--out", "out", "--weights", weights, "--set", *settings]
    )
    said = capsys.readouterr()
    assert code == (65 if weights == "ema" else 0), said.err
    assert Path("out").exists() == (weights == "auto")
    assert "part 'ema'" in said.err if weights == "ema" else "model" in said.out


def test_a_wrong_size_on_the_command_line_is_a_table_with_exit_65_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(to_official(network("dit-emoji32", in_channels=4, learned_variance=True, patch_size=2)), "w.safetensors")
    settings = [*SET.replace("hidden_size=24", "hidden_size=48").split(), "learn_sigma=true", "class_dropout_prob=0.1"]
    assert main(["convert", "facebookresearch/DiT", "w.safetensors", "--out", "out", "--set", *settings]) == 65
    assert "expected" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.safetensors"]
