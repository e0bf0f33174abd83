import dataclasses
import errno
import json
import random
import shutil

import pytest
import torch
from torch import nn

from smalti.checkpoints import load_bundle, load_model, load_tensors, save_model
from smalti.config import to_dict
from smalti.errors import CheckpointError, ConfigError, NumericError, StorageError
from smalti.models import DiTConfig, build_backbone
from smalti.nn.mixers import AttentionConfig
from smalti.storage.sealed import seal

CONFIG = DiTConfig(
    hidden_size=16, depth=2, mixer=AttentionConfig(num_heads=2), sample_size=(8, 4), in_channels=3, num_classes=5
)


def network(config=CONFIG, seed=0):
    """All weights random, so that a lost or swapped one shows."""
    model = build_backbone(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def inputs(config=CONFIG):
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(2, config.in_channels, *config.sample_size, generator=generator)
    labels = torch.tensor([1, 4]) if config.num_classes else None
    return latents, torch.tensor([3.0, 700.0]), labels


def rewrite(folder, **changes):
    """An honest config.json, correctly sealed, that says something else."""
    document = json.loads((folder / "config.json").read_text())
    del document["digest"]
    (folder / "config.json").write_bytes(seal(document | changes))


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_a_stored_model_comes_back_with_config_output_and_extra(tmp_path, conditioning, num_classes):
    config = dataclasses.replace(CONFIG, conditioning=conditioning, num_classes=num_classes)
    model = network(config)
    extra = {"schedule": {"kind": "cosine"}, "class_names": ["a", "b"], "image_size": 32}
    assert save_model(tmp_path / "deep" / "model", model, extra=extra) == tmp_path / "deep" / "model"
    bundle = load_bundle(tmp_path / "deep" / "model")
    assert bundle.extra == extra
    assert bundle.model.config == config
    assert not bundle.model.training
    assert torch.equal(bundle.model(*inputs(config)), model(*inputs(config)))
    frozen = {name for name, p in bundle.model.named_parameters() if not p.requires_grad}
    assert frozen == {"position"}
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_the_config_file_names_its_format_and_the_kind_of_backbone(tmp_path):
    save_model(tmp_path, network())
    document = json.loads((tmp_path / "config.json").read_text())
    assert (document["format"], document["version"]) == ("smalti-model", 1)
    assert document["model"] == json.loads(json.dumps(to_dict(CONFIG)))
    assert document["model"]["kind"] == "dit"


def test_a_run_folder_is_searched_for_its_model_first(tmp_path):
    save_model(tmp_path, network(seed=1))
    save_model(tmp_path / "model", network(seed=2))
    assert torch.equal(load_model(tmp_path).head.out.weight, network(seed=2).head.out.weight)
    shutil.rmtree(tmp_path / "model")
    assert torch.equal(load_model(tmp_path).head.out.weight, network(seed=1).head.out.weight)


def test_the_dtype_is_the_stored_one_unless_another_is_asked_for(tmp_path):
    save_model(tmp_path, network().bfloat16())
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}


def test_a_loaded_model_can_be_changed_without_changing_the_file(tmp_path):
    save_model(tmp_path, network())
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load_model(tmp_path)
    with torch.no_grad():
        model.head.out.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "README.md").write_text("card")
    save_model(tmp_path, network(seed=1))
    save_model(tmp_path, network(seed=2))
    assert (tmp_path / "README.md").read_text() == "card"
    assert torch.equal(load_model(tmp_path).head.out.weight, network(seed=2).head.out.weight)


def test_a_model_that_is_wrapped_not_finite_or_foreign_is_not_stored(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

    with pytest.raises(ConfigError, match="compiled or wrapped"):
        save_model(tmp_path, Wrapped(network()))
    with pytest.raises(ConfigError, match="no backbone config"):
        save_model(tmp_path, nn.Linear(2, 2))
    bad = network()
    bad.head.out.bias.data[0] = float("nan")
    with pytest.raises(NumericError, match=r"head\.out\.bias"):
        save_model(tmp_path, bad)
    assert list(tmp_path.iterdir()) == []


def crash_points(tmp_path, faults):
    fs = faults.FileSystem(tmp_path / "count")
    (tmp_path / "count").mkdir()
    save_model(tmp_path / "count" / "model", network(seed=1), extra={"seed": 1}, fs=fs)
    start = fs.calls
    save_model(tmp_path / "count" / "model", network(seed=2), extra={"seed": 2}, fs=fs)
    return start, fs.calls


def whole(folder):
    """The seed of the model and of the config stored with it, which must be one."""
    bundle = load_bundle(folder)
    seed = bundle.extra["seed"]
    assert torch.equal(bundle.model.head.out.weight, network(seed=seed).head.out.weight)
    return seed


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["kill", "lost", "names", "mixed", "unordered", "full disk"])
def test_replacing_a_model_leaves_the_old_or_the_new_one_whole_whatever_happens(tmp_path, faults, mode):
    start, end = crash_points(tmp_path, faults)
    points = range(start + 1, end + 1)
    assert len(points) > 40
    seen = set()
    some = [] if mode == "unordered" else [*points[:4], *points[4:-8:8]]  # every call but the many writes between
    for k in [*some, *points[-8:]]:
        root = tmp_path / str(k)
        root.mkdir()
        fs = faults.FileSystem(root)
        save_model(root / "model", network(seed=1), extra={"seed": 1}, fs=fs)
        full = mode == "full disk"
        fs.fault = faults.fail_at(k, errno.ENOSPC, lasting=True) if full else faults.crash_at(k)
        with pytest.raises(StorageError if full else faults.Crash) as error:
            save_model(root / "model", network(seed=2), extra={"seed": 2}, fs=fs)
        if full:
            assert "No space left on device" in str(error.value)
            assert str(root / "model") in str(error.value)
        after = root
        for seed in range({"kill": 0, "full disk": 0, "unordered": 5}.get(mode, 1)):
            after = fs.after_power_cut(tmp_path / f"{k}-after-{seed}", mode, seed=k + 1000 * seed)
            seen.add(whole(after / "model"))
        seen.add(whole(after / "model"))
        save_model(after / "model", network(seed=3), extra={"seed": 3})
        assert whole(after / "model") == 3
        assert sorted(p.name for p in (after / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert 1 in seen


@pytest.mark.faults
def test_every_flipped_bit_and_every_cut_of_a_model_is_found(tmp_path, how_often):
    flips, cuts = how_often(60, 400), how_often(60, 200)
    save_model(tmp_path, network(), extra={"class_names": ["a", "b"]})
    rng = random.Random(0)
    for i in range(flips + cuts):
        file = tmp_path / ("config.json", "model.safetensors")[i % 2]
        good = file.read_bytes()
        if i < flips:
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else:
            bad = good[: rng.randrange(len(good))]
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            load_model(tmp_path)
        file.write_bytes(good)
    load_model(tmp_path)


def test_a_missing_folder_an_empty_one_and_half_a_model_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(tmp_path)
    save_model(tmp_path, network())
    (tmp_path / "config.json").rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"has model\.safetensors but no config\.json"):
        load_model(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "config.json")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has config\.json but no model\.safetensors"):
        load_model(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "pytorch_model.bin", "model.pkl"])
def test_a_pickle_is_refused_and_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(CheckpointError, match="may be a pickle"):
        load_model(tmp_path / name)


@pytest.mark.faults
def test_a_newer_format_is_refused_with_advice(tmp_path):
    save_model(tmp_path, network())
    rewrite(tmp_path, version=2, smalti="9.9")
    with pytest.raises(CheckpointError, match=r"version 2, written by smalti 9\.9; .* update it"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "nonsense", '{"_class_name": "DiTTransformer2DModel"}', "[" * 100_000, '{"format": 3}']
)
def test_a_config_of_something_else_is_refused(tmp_path, content):
    save_model(tmp_path, network())
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (describes something else|is no JSON)"):
        load_model(tmp_path)


def test_an_unknown_backbone_and_an_unknown_setting_are_checkpoint_errors(tmp_path):
    save_model(tmp_path, network())
    good = json.loads((tmp_path / "config.json").read_text())["model"]
    rewrite(tmp_path, model=good | {"kind": "did"})
    with pytest.raises(CheckpointError, match="unknown kind 'did'; did you mean 'dit'"):
        load_model(tmp_path)
    rewrite(tmp_path, model=good | {"hidden_sise": 16})
    with pytest.raises(CheckpointError, match="unknown setting 'hidden_sise'; did you mean 'hidden_size'"):
        load_model(tmp_path)
    rewrite(tmp_path, model=good | {"depth": "2"})
    with pytest.raises(CheckpointError, match="depth: expected int, got '2'"):
        load_model(tmp_path)


@pytest.mark.faults
def test_weights_of_another_model_are_refused_with_a_short_table(tmp_path):
    save_model(tmp_path, network())
    good = json.loads((tmp_path / "config.json").read_text())["model"]
    rewrite(tmp_path, model=good | {"depth": 40})
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    lines = str(error.value).splitlines()
    assert "holds another model" in lines[0]
    assert f"{38 * 10} tensors missing, 0 unexpected, 0 of another shape" in lines[0]
    assert len(lines) <= 12
    rewrite(tmp_path, model=good | {"depth": 1})
    with pytest.raises(CheckpointError, match=r"0 tensors missing, 10 unexpected"):
        load_model(tmp_path)
    rewrite(tmp_path, model=good | {"num_classes": 7})
    with pytest.raises(CheckpointError, match=r"conditioning\.label\.weight  found \[6, 16\], expected \[8, 16\]"):
        load_model(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 32},
        {"depth": 3},
        {"depth": 1},
        {"patch_size": 4},
        {"num_classes": 6},
        {"num_classes": 0},
        {"null_class": False},
        {"learned_variance": False},
        {"in_channels": 4},
        {"mlp_ratio": 2.0},
        {"conditioning": "adaln"},
        {"conditioning": "in_context"},
    ],
    ids=str,
)
def test_tensors_of_another_preset_are_never_loaded(changes):
    model = network(dataclasses.replace(CONFIG, **changes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="step-7 holds another model than the DiT asked for"):
        load_tensors(model, network().state_dict(), "step-7")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.faults
def test_tensors_of_the_same_preset_are_loaded_in_place():
    model, other = network(seed=1), network(seed=2)
    head = model.head.out.weight
    load_tensors(model, other.state_dict(), "here")
    assert model.head.out.weight is head
    assert torch.equal(head, other.head.out.weight)
