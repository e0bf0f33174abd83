"""The released DiT, through `from_official`: names, shapes, outputs, guidance, gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.checkpoints import MAPS, KeyMap, from_official, load_model, save_model, to_official
from smalti.diffusion.guidance import guide
from smalti.errors import CheckpointError, ConfigError
from smalti.models import DiTConfig, build_backbone
from smalti.nn.mixers import AttentionConfig

SOURCE = "facebookresearch/DiT"
DATA = Path(__file__).parents[1] / "data" / "parity"
INDEX = json.loads((DATA / "index_dit.json").read_text())["files"]
PRESETS = json.loads((DATA / "key_map_dit.json").read_text())
GUIDED = [(name, key) for name, entry in INDEX.items() for key in entry["outputs"] if key.startswith("output.cfg_")]


def golden(name):
    tensors = load_file(DATA / name)
    weights = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return tensors, weights, dict(INDEX[name]["hyperparams"])


def error(a, reference):
    exact = reference.detach().double()
    return float((a.detach().double() - exact).abs().max() / exact.abs().max())


def tolerance(name, dtype):
    """As the index states it; the float64 one is a sentence that begins with the number."""
    stated = INDEX[name]["suggested_tolerance"]
    if dtype == torch.float32:
        return stated["outputs_float32_implementation"]
    return float(stated["outputs_float64_implementation"].split()[0])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", INDEX)
def test_outputs_equal_those_of_the_released_code(name, dtype, training):
    tensors, weights, hyperparameters = golden(name)
    model = from_official(SOURCE, {k: v.to(dtype) for k, v in weights.items()}, **hyperparameters)
    assert not model.training
    model.train(training)
    output = model(tensors["input.x"].to(dtype), tensors["input.t"], tensors["input.y"])
    assert output.dtype == dtype
    assert error(output, tensors["output.y"]) <= tolerance(name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "key"), GUIDED)
def test_guided_outputs_equal_those_of_the_released_code(name, key, dtype):
    tensors, weights, hyperparameters = golden(name)
    model = from_official(SOURCE, {k: v.to(dtype) for k, v in weights.items()}, **hyperparameters)
    half = tensors["input.x"].to(dtype).chunk(2)[0]
    cond, uncond = model(torch.cat([half, half]), tensors["input.t"], tensors["input.y"]).chunk(2)
    kept = guide(cond, uncond, float(key.removeprefix("output.cfg_")), 3)
    # The half that smalti drops: guided channels as in the other, the rest its own.
    dropped = torch.cat([kept[:, :3], uncond[:, 3:]], dim=1)
    assert error(torch.cat([kept, dropped]), tensors[key]) <= tolerance(name, dtype)


@pytest.mark.parametrize("name", [name for name, entry in INDEX.items() if "output.loss" in entry["outputs"]])
def test_gradients_equal_those_of_the_released_code(name):
    tensors, weights, hyperparameters = golden(name)
    model = from_official(SOURCE, weights, **hyperparameters)
    latents = tensors["input.x"].requires_grad_()
    loss = model(latents, tensors["input.t"], tensors["input.y"]).square().mean()
    loss.backward()
    assert error(loss.detach(), tensors["output.loss"]) <= tolerance(name, torch.float32)
    theirs, unknown = MAPS[SOURCE].keys.to_theirs(k for k, _ in model.named_parameters())
    assert unknown == []
    found = {theirs[k]: p.grad for k, p in model.named_parameters() if p.requires_grad} | {"input.x": latents.grad}
    wanted = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert found.keys() == wanted.keys()
    stated = INDEX[name]["suggested_tolerance"]["grads_float32_implementation"]
    for key, reference in wanted.items():
        assert error(found[key], reference) <= stated, key


def test_the_golden_files_cover_guidance_gradients_a_missing_null_row_and_a_table_of_positions():
    assert len(INDEX) == 6
    assert len(GUIDED) == 3
    assert any("output.loss" in entry["outputs"] for entry in INDEX.values())
    assert any(entry["hyperparams"]["class_dropout_prob"] == 0 for entry in INDEX.values())


@pytest.mark.faults
@pytest.mark.parametrize("name", INDEX)
def test_weights_go_there_and_back_bit_for_bit(name):
    _, weights, hyperparameters = golden(name)
    back = to_official(from_official(SOURCE, weights, **hyperparameters))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in weights.items())


@pytest.mark.parametrize(("name", "position"), [("dit_p8", "sincos_2d"), ("dit_no_null_randpos", "table")])
def test_the_loaded_table_is_used_and_one_that_is_not_sincos_fits_one_size_only(tmp_path, name, position):
    tensors, weights, hyperparameters = golden(f"{name}.safetensors")
    model = from_official(SOURCE, weights, **hyperparameters)
    assert model.config.position == position
    assert torch.equal(model.position, weights["pos_embed"])
    larger = torch.cat([tensors["input.x"], tensors["input.x"]], dim=3)
    if position == "table":
        with pytest.raises(ValueError, match="position table"):
            model(larger, tensors["input.t"], tensors["input.y"])
    else:
        assert model(larger, tensors["input.t"], tensors["input.y"]).shape[-2:] == larger.shape[-2:]
    save_model(tmp_path, model)
    again = load_model(tmp_path)(tensors["input.x"], tensors["input.t"], tensors["input.y"])
    assert error(again, tensors["output.y"]) <= tolerance(f"{name}.safetensors", torch.float32)


def test_a_table_that_drifted_with_the_moving_average_still_counts_as_sincos():
    _, weights, hyperparameters = golden("dit_p8.safetensors")
    table, average = weights["pos_embed"], weights["pos_embed"].clone()
    for _ in range(20_000):
        average.mul_(0.9999).add_(table, alpha=1 - 0.9999)
    assert not torch.equal(average, table)
    model = from_official(SOURCE, weights | {"pos_embed": average}, **hyperparameters)
    assert model.config.position == "sincos_2d"
    assert torch.equal(model.position, average)


def test_a_model_without_a_null_row_has_none():
    _, weights, hyperparameters = golden("dit_no_null_randpos.safetensors")
    model = from_official(SOURCE, weights, **hyperparameters)
    assert not model.config.null_class
    assert model.conditioning.label.weight.shape[0] == model.config.num_classes == hyperparameters["num_classes"]


def test_the_model_keeps_a_copy_of_the_weights():
    _, weights, hyperparameters = golden("dit_p8.safetensors")
    model = from_official(SOURCE, weights, **hyperparameters)
    before = weights["final_layer.linear.weight"].clone()
    with torch.no_grad():
        model.head.out.weight.zero_()
    assert torch.equal(weights["final_layer.linear.weight"], before)


def test_half_precision_weights_with_a_float32_table_become_one_dtype():
    _, weights, hyperparameters = golden("dit_p8.safetensors")
    mixed = {k: v if k == "pos_embed" else v.half() for k, v in weights.items()}
    model = from_official(SOURCE, mixed, **hyperparameters)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- names ---


@pytest.mark.faults
@pytest.mark.parametrize("preset", PRESETS)
def test_the_key_map_is_total_and_invertible_on_every_released_preset(preset):
    row = PRESETS[preset]
    weights = {k: torch.empty(shape, device="meta") for k, shape in row["keys"].items()}
    model = from_official(SOURCE, weights, **row["hyperparams"])
    keys = MAPS[SOURCE].keys
    ours, unknown = keys.to_ours(weights)
    assert unknown == []
    assert keys.idle(weights) == []
    assert ours.keys() == weights.keys()
    assert sorted(ours.values()) == sorted(model.state_dict())
    theirs, unknown = keys.to_theirs(ours.values())
    assert unknown == []
    assert theirs == {o: t for t, o in ours.items()}
    assert {k: list(v.shape) for k, v in to_official(model).items()} == row["keys"]
    assert sum(p.numel() for p in model.parameters()) == row["num_parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == row["num_parameters_requires_grad"]


def test_all_twelve_presets_and_the_larger_one_for_512_pixels_are_checked():
    assert len(PRESETS) == 13


def test_a_key_map_with_two_rules_for_one_name_is_an_error():
    with pytest.raises(ValueError, match="claimed by the rules"):
        KeyMap({"a.{}": "x.{}", "a.1": "y"}).to_ours(["a.1.weight"])
    with pytest.raises(ValueError, match="become one"):
        KeyMap({"a": "x", "b": "x"}).to_ours(["a", "b"])


def test_a_key_map_knows_whole_names_only():
    keys = KeyMap({"a.{}.b": "x.{}.y"})
    assert keys.to_ours(["a.10.b.weight", "a.01.b", "a.1.b.c", "za.1.b", "a.1.b"]) == (
        {"a.10.b.weight": "x.10.y.weight", "a.1.b": "x.1.y"},
        ["a.01.b", "a.1.b.c", "za.1.b"],
    )


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 24}, "unknown hyper-parameter 'hiden_size'; did you mean 'hidden_size'"),
        ({"depth": None}, "hyper-parameter depth is None, expected int"),
        ({"depth": True}, "hyper-parameter depth is True, expected int"),
        ({"learn_sigma": 1}, "hyper-parameter learn_sigma is 1, expected bool"),
        ({"num_heads": 5}, "cannot be split into 5 heads"),
        ({"patch_size": 3}, "cannot be cut into patches of 3"),
        ({"num_classes": 0}, "num_classes 0 must be at least 1"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob 1.5 in"),
    ],
)
def test_wrong_hyperparameters_are_config_errors(change, message):
    _, weights, hyperparameters = golden("dit_p8.safetensors")
    with pytest.raises(ConfigError, match=message):
        from_official(SOURCE, weights, **(hyperparameters | change))


@pytest.mark.parametrize("name", MAPS[SOURCE].hyperparameters)
def test_every_hyperparameter_is_needed(name):
    _, weights, hyperparameters = golden("dit_p8.safetensors")
    del hyperparameters[name]
    with pytest.raises(ConfigError, match=f"missing hyper-parameter {name}"):
        from_official(SOURCE, weights, **hyperparameters)


def test_an_unknown_source_is_a_config_error():
    with pytest.raises(ConfigError, match="did you mean 'facebookresearch/DiT'"):
        from_official("facebookresearch/dit", {})


@pytest.mark.faults
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 32},
        {"depth": 2},
        {"depth": 4},
        {"patch_size": 4},
        {"input_size": 16},
        {"in_channels": 3},
        {"num_classes": 6},
        {"class_dropout_prob": 0.0},
        {"learn_sigma": False},
        {"mlp_ratio": 2.0},
    ],
    ids=str,
)
def test_weights_of_another_preset_are_refused_with_a_table(change):
    _, weights, hyperparameters = golden("dit_p8.safetensors")
    with pytest.raises(CheckpointError, match=r"\d+ tensors missing, \d+ unexpected, \d+ of another shape"):
        from_official(SOURCE, weights, **(hyperparameters | change))


@pytest.mark.faults
def test_missing_and_unexpected_keys_are_listed():
    _, weights, hyperparameters = golden("dit_p8.safetensors")
    renamed = {k.replace("blocks.1.attn.proj.bias", "blocks.1.attn.prj.bias"): v for k, v in weights.items()}
    with pytest.raises(CheckpointError) as caught:
        from_official(SOURCE, renamed, **hyperparameters)
    assert "missing     blocks.1.attn.proj.bias  [24]" in str(caught.value)
    assert "unexpected  blocks.1.attn.prj.bias  [24]" in str(caught.value)


def test_a_whole_training_checkpoint_a_wrapped_one_and_an_empty_one_get_advice():
    _, weights, hyperparameters = golden("dit_p8.safetensors")
    with pytest.raises(CheckpointError, match="pass its entry 'ema'"):
        from_official(SOURCE, {"model": weights, "ema": weights, "opt": {}, "args": 0}, **hyperparameters)
    with pytest.raises(CheckpointError, match=r"all names begin with 'module\.'"):
        from_official(SOURCE, {f"module.{k}": v for k, v in weights.items()}, **hyperparameters)
    with pytest.raises(CheckpointError, match="are empty"):
        from_official(SOURCE, {}, **hyperparameters)
    weights["final_layer.linear.bias"][0] = float("inf")
    with pytest.raises(CheckpointError, match=r"final_layer\.linear\.bias is not finite"):
        from_official(SOURCE, weights, **hyperparameters)


def test_a_network_that_was_never_released_has_no_released_form():
    config = DiTConfig(
        hidden_size=16, depth=1, mixer=AttentionConfig(num_heads=2), sample_size=(8, 8), conditioning="cross_attention"
    )
    with pytest.raises(ConfigError, match="never released"):
        to_official(build_backbone(config))
    with pytest.raises(ConfigError, match="no backbone"):
        to_official(torch.nn.Linear(2, 2))
