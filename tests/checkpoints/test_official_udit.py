"""The released U-DiT, through `from_official`: outputs as trained and fused, guidance, gradients, names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.checkpoints import MAPS, from_official, to_official
from smalti.diffusion.guidance import guide
from smalti.errors import CheckpointError, ConfigError
from smalti.models import UDiT, UDiTConfig, build_backbone
from smalti.nn.mixers import AttentionConfig, DownsampledAttentionConfig

pytestmark = pytest.mark.usefixtures("deterministic")

SOURCE = "YuchuanTian/U-DiT"
DATA = Path(__file__).parents[1] / "data" / "parity"
INDEX = {k: v for k, v in json.loads((DATA / "index_udit.json").read_text())["files"].items() if k.startswith("udit_")}
PRESETS = json.loads((DATA / "key_map_udit.json").read_text())
OUTPUTS = [(f, k) for f, entry in INDEX.items() for k in entry["outputs"] if "BUG" not in k and k != "output.loss"]
GUIDED = [(f, k) for f, k in OUTPUTS if "_cfg_" in k]
PLAIN = [(f, k) for f, k in OUTPUTS if "_cfg_" not in k]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def golden(name):
    tensors = load_file(DATA / name)
    weights = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return tensors, weights, dict(INDEX[name]["hyperparams"])


def network(name, dtype=torch.float32):
    tensors, weights, hyperparameters = golden(name)
    return tensors, from_official(SOURCE, {k: v.to(dtype) for k, v in weights.items()}, **hyperparameters)


def inputs(tensors, key="output.eval", dtype=torch.float32):
    number = next((n for n in ("_2", "_3", "_4", "_5") if key.endswith(n)), "")
    return tensors[f"input.x{number}"].to(dtype), tensors[f"input.t{number}"], tensors[f"input.y{number}"]


def error(a, reference):
    exact = reference.detach().double()
    return float((a.detach().double() - exact).abs().max() / exact.abs().max())


def tolerance(name, dtype):
    """As the index states it; the float64 one is a sentence that begins with the number."""
    stated = INDEX[name]["suggested_tolerance"]
    if dtype == torch.float32:
        return stated["outputs_float32_implementation"]
    return float(stated["outputs_float64_implementation"].split()[0])


@DTYPES
@pytest.mark.parametrize(("name", "key"), PLAIN)
def test_outputs_equal_those_of_the_released_code(name, key, dtype):
    tensors, model = network(name, dtype)
    assert not model.training
    for form in (model, model.train(), model.fuse()):
        with torch.no_grad():
            output = form(*inputs(tensors, key, dtype))
        assert output.dtype == dtype
        assert error(output, tensors[key]) <= tolerance(name, dtype)


@DTYPES
@pytest.mark.parametrize(("name", "key"), GUIDED)
def test_guided_outputs_equal_those_of_the_released_code(name, key, dtype):
    tensors, model = network(name, dtype)
    half = tensors["input.x"].to(dtype).chunk(2)[0]
    with torch.no_grad():
        cond, uncond = model(torch.cat([half, half]), tensors["input.t"], tensors["input.y"]).chunk(2)
    kept = guide(cond, uncond, float(key.removeprefix("output.eval_cfg_")), 3)
    # The half that smalti drops: guided channels as in the other, the rest its own.
    dropped = torch.cat([kept[:, :3], uncond[:, 3:]], dim=1)
    assert error(torch.cat([kept, dropped]), tensors[key]) <= tolerance(name, dtype)


@pytest.mark.parametrize("name", [name for name, entry in INDEX.items() if "output.loss" in entry["outputs"]])
@DTYPES
def test_gradients_equal_those_of_the_released_code(name, dtype):
    tensors, model = network(name, dtype)
    latents, timesteps, labels = inputs(tensors, dtype=dtype)
    latents = latents.requires_grad_()
    loss = model(latents, timesteps, labels).square().mean()
    loss.backward()
    assert error(loss, tensors["output.loss"]) <= tolerance(name, torch.float32)
    theirs, unknown = MAPS[SOURCE].keys.to_theirs(k for k, _ in model.named_parameters())
    assert unknown == []
    found = {theirs[k]: p.grad for k, p in model.named_parameters()} | {"input.x": latents.grad}
    wanted = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert found.keys() == wanted.keys()
    stated = INDEX[name]["suggested_tolerance"]["grads_float32_implementation"]
    for key, reference in wanted.items():
        if reference.abs().max() == 0:  # a temperature above its cap
            assert found[key].abs().max() == 0, key
        else:
            assert error(found[key], reference) <= stated, key


def test_the_golden_files_cover_all_forms():
    assert len(PLAIN) == 23
    assert len(GUIDED) == 2
    assert sum("output.loss" in entry["outputs"] for entry in INDEX.values()) == 2
    assert {entry["hyperparams"]["ffn_type"] for entry in INDEX.values()} == {"rep", "basic"}
    assert {entry["hyperparams"]["rep"] for entry in INDEX.values()} == {0, 1}


# --- the defect of the released `eval()` ---


@pytest.mark.parametrize("name", INDEX)
def test_switching_between_training_and_evaluation_changes_no_bit(name):
    tensors, model = network(name)
    arguments = inputs(tensors)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with torch.no_grad():
        first = model(*arguments)
        for switch in ("eval", "eval", "train", "eval", "train"):
            getattr(model, switch)()
            assert torch.equal(model(*arguments), first)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_the_released_defect_is_not_repeated():
    tensors, model = network("udit_double_eval_record.safetensors")
    model.eval()
    model.eval()
    with torch.no_grad():
        outputs = [model(*inputs(tensors)), model.train()(*inputs(tensors)), model.fuse().eval()(*inputs(tensors))]
    bugs = [v for k, v in tensors.items() if k.startswith("output.BUG_")]
    assert len(bugs) == 4
    assert all(error(output, bug) > 1e-3 for output in outputs for bug in bugs)
    kernel = model.stages[0][0].layers[0].mlp.depthwise5.weight
    assert torch.equal(kernel, tensors["record.dwconv0_clean"])


# --- names ---


@pytest.mark.faults
@pytest.mark.parametrize("name", INDEX)
def test_weights_go_there_and_back_bit_for_bit(name):
    _, weights, hyperparameters = golden(name)
    back = to_official(from_official(SOURCE, weights, **hyperparameters))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in weights.items())


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
    assert sorted(ours.values()) == sorted(model.state_dict())
    theirs, unknown = keys.to_theirs(ours.values())
    assert unknown == []
    assert theirs == {o: t for t, o in ours.items()}
    assert {k: list(v.shape) for k, v in to_official(model).items()} == row["keys"]
    assert sum(p.numel() for p in model.parameters()) == row["num_parameters"]
    assert all(p.requires_grad for p in model.parameters())


def test_the_fused_network_is_the_released_one_without_parallel_convolutions():
    _, model = network("udit_tiny_grad.safetensors")
    back = to_official(model.fuse())
    hyperparameters = INDEX["udit_tiny_grad.safetensors"]["hyperparams"] | {"rep": 0, "down_shortcut": 0}
    again = from_official(SOURCE, back, **hyperparameters)
    assert again.config == model.fuse().config


def test_what_the_released_sizes_share_may_be_left_out():
    row = PRESETS["U-DiT-S"]
    weights = {k: torch.empty(shape, device="meta") for k, shape in row["keys"].items()}
    short = from_official(SOURCE, weights, hidden_size=96, num_heads=4)
    assert short.config == from_official(SOURCE, weights, **row["hyperparams"]).config
    with pytest.raises(ConfigError, match="missing hyper-parameter hidden_size, num_heads"):
        from_official(SOURCE, weights)


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 24}, "unknown hyper-parameter 'hiden_size'; did you mean 'hidden_size'"),
        ({"depth": 5}, "hyper-parameter depth is 5, expected list"),
        ({"depth": [1, 1, 1]}, r"hyper-parameter depth is \[1, 1, 1\], expected five whole numbers"),
        ({"depth": [1, 1, 1, 1, 1.5]}, "expected five whole numbers"),
        ({"attn_type": "v3"}, "hyper-parameter attn_type is 'v3', expected one of 'v2', None"),
        ({"posemb_type": "rope"}, "hyper-parameter posemb_type is 'rope', expected one of 'rope2d', None"),
        ({"ffn_type": "rap"}, "hyper-parameter ffn_type is 'rap', expected one of 'rep', 'basic'"),
        ({"posemb_type": 3}, r"hyper-parameter posemb_type is 3, expected str \| None"),
        ({"downsampler": "dwconv7"}, "unknown downsampler 'dwconv7'; did you mean 'dwconv5'"),
        ({"down_factor": 0}, "factor 0"),
        ({"num_heads": 3}, "hidden_size 8 cannot be split into 3 heads"),
        ({"input_size": 12}, "latents of 12x12 .* divisible by 8"),
        ({"num_classes": 0}, "num_classes 0 must be at least 1"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob 1.5 in"),
    ],
)
def test_wrong_hyperparameters_are_config_errors(change, message):
    _, weights, hyperparameters = golden("udit_tiny_grad.safetensors")
    with pytest.raises(ConfigError, match=message) as caught:
        from_official(SOURCE, weights, **(hyperparameters | change))
    assert "\n" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 16},
        {"depth": [1, 1, 2, 1, 1]},
        {"depth": (1, 1, 1, 1, 0)},
        {"in_channels": 3},
        {"num_classes": 6},
        {"class_dropout_prob": 0.0},
        {"learn_sigma": False},
        {"mlp_ratio": 3},
        {"rep": 0},
        {"ffn_type": "basic"},
        {"attn_type": None},
        {"downsampler": "dwconv3"},
    ],
    ids=str,
)
def test_weights_of_another_preset_are_refused_with_a_table(change):
    _, weights, hyperparameters = golden("udit_tiny_grad.safetensors")
    with pytest.raises(CheckpointError, match=r"\d+ tensors missing, \d+ unexpected, \d+ of another shape"):
        from_official(SOURCE, weights, **(hyperparameters | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": AttentionConfig(num_heads=2)}, "cannot do the mixer 'attention'"),
        ({"conditioning": "adaln"}, "cannot do the conditioning 'adaln'"),
        ({"sample_size": (8, 16)}, "cannot do rotary positions by row and column on 8x16"),
    ],
)
def test_a_network_that_was_never_released_has_no_released_form(change, message):
    settings = {"hidden_size": 8, "depth": (1, 0, 0, 0, 0), "sample_size": (8, 8), "num_classes": 3}
    mixer = DownsampledAttentionConfig(num_heads=2)
    config = UDiTConfig(**{"mixer": mixer} | settings | change)
    with pytest.raises(ConfigError, match=message):
        to_official(build_backbone(config))
    assert to_official(UDiT(UDiTConfig(mixer=mixer, **settings)))
