"""The released Diffusion-RWKV, through `from_official`: names, shapes, outputs, guidance, gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.checkpoints import MAPS, from_official, to_official
from smalti.config import replace
from smalti.diffusion.guidance import guide
from smalti.errors import CheckpointError, ConfigError
from smalti.models import DRWKVConfig, build_backbone
from smalti.nn.mixers import AttentionConfig, BiWKVConfig

SOURCE = "feizc/Diffusion-RWKV"
DATA = Path(__file__).parents[1] / "data" / "parity"
FILES = json.loads((DATA / "index_drwkv.json").read_text())["files"]
INDEX = {name: entry for name, entry in FILES.items() if entry["kind"] == "model"}
PRESETS = json.loads((DATA / "key_map_drwkv.json").read_text())
PREFIX = {"release": "output.", "paper": "output_paper."}
GRADIENTS = {"release": "grad_exact.", "paper": "grad_paper."}
BOTH = pytest.mark.parametrize("wkv", ["release", "paper"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
GUIDED = [(name, s) for name in INDEX for s in ("1.5", "3.0") if f"output.cfg_{s}" in INDEX[name]["outputs"]]
DERIVED = [name for name, entry in INDEX.items() if "output.loss" in entry["outputs"]]


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


@BOTH
@DTYPES
@pytest.mark.parametrize("name", INDEX)
def test_outputs_equal_those_of_the_released_code_and_those_of_the_published_formula(name, dtype, wkv):
    tensors, weights, hyperparameters = golden(name)
    model = from_official(SOURCE, {k: v.to(dtype) for k, v in weights.items()}, **hyperparameters, wkv=wkv)
    output = model(tensors["input.x"].to(dtype), tensors["input.t"], tensors.get("input.y"))
    assert output.dtype == dtype
    assert error(output, tensors[f"{PREFIX[wkv]}y"]) <= tolerance(name, dtype)


@BOTH
@DTYPES
@pytest.mark.parametrize(("name", "scale"), GUIDED)
def test_guided_outputs_equal_those_of_the_released_code(name, scale, dtype, wkv):
    tensors, weights, hyperparameters = golden(name)
    model = from_official(SOURCE, {k: v.to(dtype) for k, v in weights.items()}, **hyperparameters, wkv=wkv)
    half = tensors["input.x"].to(dtype).chunk(2)[0]
    cond, uncond = model(torch.cat([half, half]), tensors["input.t"], tensors["input.y"]).chunk(2)
    kept = guide(cond, uncond, float(scale), 3)
    # The half that smalti drops: guided channels as in the other, the rest its own.
    dropped = torch.cat([kept[:, :3], uncond[:, 3:]], dim=1)
    assert error(torch.cat([kept, dropped]), tensors[f"{PREFIX[wkv]}cfg_{scale}"]) <= tolerance(name, dtype)


@BOTH
@DTYPES
@pytest.mark.parametrize("name", DERIVED)
def test_gradients_are_the_derivatives_of_the_outputs(name, dtype, wkv):
    """The released backward kernel is not the derivative of its forward; ours is, and the index holds the true one."""
    tensors, weights, hyperparameters = golden(name)
    model = from_official(SOURCE, {k: v.to(dtype) for k, v in weights.items()}, **hyperparameters, wkv=wkv)
    latents = tensors["input.x"].to(dtype).requires_grad_()
    loss = model(latents, tensors["input.t"], tensors.get("input.y")).square().mean()
    loss.backward()
    assert error(loss.detach(), tensors[f"{PREFIX[wkv]}loss"]) <= tolerance(name, torch.float32)
    theirs, unknown = MAPS[SOURCE].keys.to_theirs(k for k, _ in model.named_parameters())
    assert unknown == []
    found = {theirs[k]: p.grad for k, p in model.named_parameters()} | {"input.x": latents.grad}
    wanted = {k.removeprefix(GRADIENTS[wkv]): v for k, v in tensors.items() if k.startswith(GRADIENTS[wkv])}
    assert found.keys() == wanted.keys()
    stated = INDEX[name]["suggested_tolerance"]["grads_float32_implementation"]
    allowed = stated if dtype == torch.float32 else 2e-7 * 4  # stored in float32, beside tables in float32
    for key, reference in wanted.items():
        assert error(found[key], reference) <= allowed, key


@pytest.mark.parametrize("name", DERIVED)
def test_where_the_released_backward_is_right_it_is_ours(name):
    """Behind the last Bi-WKV no wrong gradient has passed yet: there both agree, and further down they do not."""
    tensors, _, _ = golden(name)
    released = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    apart = {k for k, v in released.items() if error(v, tensors[f"grad_exact.{k}"]) > 1e-4}
    assert "out_blocks.0.att.key.weight" in apart
    assert not {k for k in apart if k.startswith(("final_layer", "norm_f", "out_blocks.0.ffn", "out_blocks.0.att.out"))}


def test_the_golden_files_cover_what_released_networks_differ_in():
    given = [entry["hyperparams"] for entry in INDEX.values()]
    assert len(INDEX) == 9
    assert {h["shift_pixel"] for h in given} == {0, 1}
    assert {h["post_norm"] for h in given} == {h["key_norm"] for h in given} == {False, True}
    assert {h["depth"] % 2 for h in given} == {0, 1}
    assert any(entry["no_skip_variant"] for entry in INDEX.values())
    assert any(h["num_classes"] == -1 for h in given)
    assert len(DERIVED) == 2
    assert len(GUIDED) == 2


def test_the_released_arithmetic_is_the_default_and_not_the_published_formula():
    name = "drwkv_postnorm_keynorm.safetensors"
    tensors, weights, hyperparameters = golden(name)
    model = from_official(SOURCE, weights, **hyperparameters)
    assert model.config.mixer.wkv == "release"
    output = model(tensors["input.x"], tensors["input.t"], tensors["input.y"])
    assert (
        error(output, tensors["output.y"]) <= tolerance(name, torch.float32) < error(output, tensors["output_paper.y"])
    )


@pytest.mark.faults
@pytest.mark.parametrize("name", INDEX)
def test_weights_go_there_and_back_bit_for_bit(name):
    _, weights, hyperparameters = golden(name)
    back = to_official(from_official(SOURCE, weights, **hyperparameters))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in weights.items())


def test_weights_without_long_skips_become_a_network_without_and_half_of_them_are_refused():
    _, weights, hyperparameters = golden("drwkv_noskip.safetensors")
    assert from_official(SOURCE, weights, **hyperparameters).config.skip == "none"
    _, weights, hyperparameters = golden("drwkv_cond_T64.safetensors")
    assert from_official(SOURCE, weights, **hyperparameters).config.skip == "concat"
    del weights["out_blocks.1.skip_linear.weight"], weights["out_blocks.1.skip_linear.bias"]
    with pytest.raises(CheckpointError, match=r"2 tensors missing, 0 unexpected"):
        from_official(SOURCE, weights, **hyperparameters)


def test_an_even_depth_has_one_block_more_and_no_shift_has_no_shares():
    _, weights, hyperparameters = golden("drwkv_noshift_evendepth.safetensors")
    model = from_official(SOURCE, weights, **hyperparameters)
    assert hyperparameters["depth"] == 4
    assert model.config.depth == len(list(model.iter_blocks())) == 5
    assert not any("shares" in name for name, _ in model.named_parameters())


def test_what_the_released_constructor_presets_may_be_left_out():
    entry = FILES["e2e_drwkv_ddpm_cfg_clip.safetensors"]
    tensors = load_file(DATA / "e2e_drwkv_ddpm_cfg_clip.safetensors")
    weights = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    assert set(entry["hyperparams"]) < set(MAPS[SOURCE].hyperparameters)
    model = from_official(SOURCE, weights, **entry["hyperparams"])
    assert model.config == DRWKVConfig(
        sample_size=(8, 8), hidden_size=16, depth=3, num_classes=6, mixer=BiWKVConfig(wkv="release")
    )
    given = dict(entry["hyperparams"])
    del given["embed_dim"]
    with pytest.raises(ConfigError, match="missing hyper-parameter embed_dim"):
        from_official(SOURCE, weights, **given)


@pytest.mark.parametrize("name", INDEX)
def test_a_config_says_the_hyperparameters_that_build_it_again(name):
    _, weights, hyperparameters = golden(name)
    model = from_official(SOURCE, weights, **hyperparameters)
    said = MAPS[SOURCE].released(model.config)
    assert "wkv" not in said  # ours
    assert from_official(SOURCE, weights, **said).config == model.config
    for changes in ({"skip": "add"}, {"norm_affine": False}, {"mixer": AttentionConfig(num_heads=2)}):
        with pytest.raises(ConfigError, match="never released"):
            MAPS[SOURCE].released(replace(model.config, **changes))


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


def test_every_rule_meets_a_tensor_of_some_golden_file():
    keys = MAPS[SOURCE].keys
    names = [{k.removeprefix("state.") for k in load_file(DATA / name) if k.startswith("state.")} for name in INDEX]
    met = [set(keys.rules) - set(type(keys)(keys.rules).idle(each)) for each in names]
    assert set.union(*met) == set(keys.rules)
    assert keys.optional == set(keys.rules) - set.intersection(*met)


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dmi": 24}, "unknown hyper-parameter 'embed_dmi'; did you mean 'embed_dim'"),
        ({"depth": None}, "hyper-parameter depth is None, expected int"),
        ({"key_norm": 1}, "hyper-parameter key_norm is 1, expected bool"),
        ({"layer_scale": False}, "layer_scale is False: networks were released with True only"),
        ({"shift_mode": "other"}, "shift_mode is 'other': networks were released with 'q_shift' only"),
        ({"skip": False}, "skip is False: networks were released with True only"),
        ({"drop_rate": 0.1}, "drop_rate is 0.1: networks were released with 0.0 only"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon is 1e-06: networks were released with 1e-05 only"),
        ({"init_mode": "fanci"}, "unknown init 'fanci'; did you mean 'fancy'?"),
        ({"wkv": "papers"}, "unknown wkv 'papers'; did you mean 'paper'?"),
        ({"num_classes": -2}, "num_classes -2 must be at least 1"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob 1.5"),
        ({"drop_path_rate": -0.1}, "drop_path_rate -0.1"),
        ({"depth": 1}, "depth 1 leaves no block"),
        ({"hidden_rate": 0}, "hidden_rate 0"),
        ({"shift_pixel": -1}, "shift -1 must be at least 0"),
        ({"channel_gamma": 0.5}, "the fraction 0.5"),
        ({"patch_size": 3}, "cannot be cut into patches of 3"),
        ({"embed_dim": 18}, "hidden_size 18 must be a multiple of 4"),
    ],
    ids=str,
)
def test_wrong_hyperparameters_are_config_errors_in_one_line(change, message):
    _, weights, hyperparameters = golden("drwkv_cond_T64.safetensors")
    with pytest.raises(ConfigError) as caught:
        from_official(SOURCE, weights, **(hyperparameters | change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize(
    "change",
    [
        {"embed_dim": 32},
        {"depth": 7},
        {"depth": 3},
        {"patch_size": 4},
        {"img_size": 32},
        {"channels": 3},
        {"num_classes": -1},
        {"class_dropout_prob": 0.0},
        {"learn_sigma": False},
        {"hidden_rate": 2},
        {"key_norm": True},
        {"shift_pixel": 0},
    ],
    ids=str,
)
def test_weights_of_another_network_are_refused_with_a_table(change):
    _, weights, hyperparameters = golden("drwkv_cond_T64.safetensors")
    with pytest.raises(CheckpointError, match=r"\d+ tensors missing, \d+ unexpected, \d+ of another shape"):
        from_official(SOURCE, weights, **(hyperparameters | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning": "in_context"}, "cannot do conditioning 'in_context'"),
        ({"conditioning": "adaln"}, "cannot do conditioning 'adaln'"),
        ({"norm_affine": False}, "which this network has not"),
        ({"mlp_ratio": 2.5}, "cannot do mlp_ratio 2.5"),
        ({"mixer": AttentionConfig(num_heads=2)}, "has no name for"),
        ({"skip": "add"}, "with skip 'add'"),
        ({"mixer": BiWKVConfig(divide_bonus=False)}, "cannot do divide_bonus False"),
        ({"mixer": BiWKVConfig(shift=2)}, "cannot do a shift or key_norm in the mixer that differs"),
        ({"sample_size": (8, 12)}, "cannot do sample_size 8x12"),
        ({"position": "frozen"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_network_that_was_never_released_has_no_released_form(change, message):
    config = DRWKVConfig(**({"hidden_size": 16, "depth": 3, "sample_size": (8, 8), "num_classes": 5} | change))
    network = build_backbone(config)
    if message is None:
        assert "mid_block.att.spatial_decay" in to_official(network)
        return
    with pytest.raises(ConfigError) as caught:
        to_official(network)
    assert message in str(caught.value)
    assert "never released" in str(caught.value)
