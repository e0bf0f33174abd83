"""The released diagonal layers of S4, through `from_official`: kernels, outputs, gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.checkpoints import from_official, to_official
from smalti.checkpoints.maps import LAYERS, MAPS
from smalti.errors import CheckpointError, ConfigError
from smalti.nn.layers import Grid
from smalti.nn.mixers import BiSSM, BiSSMConfig, build_mixer

SOURCE = "state-spaces/s4"
DATA = Path(__file__).parents[1] / "data" / "parity"
INDEX = json.loads((DATA / "index_s4.json").read_text())["files"]
LENGTHS = [
    (name, key.split(".")[0])
    for name, entry in INDEX.items()
    for key in entry["tensors"]
    if key.endswith(".output.y") and key[0] == "L"
]
EACH = pytest.mark.parametrize(("name", "length"), LENGTHS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def golden(name):
    tensors = load_file(DATA / name)
    weights = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return tensors, weights, dict(INDEX[name]["hyperparams"])


def row_of(hyperparameters):
    origin = LAYERS[SOURCE]
    return origin.variant(hyperparameters) or origin


def error(a, reference):
    exact = reference.detach().double()
    return float((a.detach().double() - exact).abs().max() / exact.abs().max())


def run(name, length, dtype):
    """The mixer, its output as the released layer lays it out, the input it was given, and all tensors."""
    tensors, weights, hyperparameters = golden(name)
    mixer = from_official(SOURCE, {k: v.to(dtype) for k, v in weights.items()}, **hyperparameters)
    given = tensors[f"{length}.input.u"].to(dtype).requires_grad_()
    channels_first = hyperparameters.get("transposed", True)
    tokens = given.mT if channels_first else given
    output = mixer(tokens, Grid(1, tokens.shape[1]))
    return mixer, output.mT if channels_first else output, given, tensors


def tolerance(name, dtype):
    stated = INDEX[name]["suggested_tolerance"]
    return stated["outputs_float32_implementation"] if dtype == torch.float32 else 2e-7  # numbers stored in float32


@DTYPES
@EACH
def test_kernels_equal_those_of_the_released_code(name, length, dtype):
    tensors, weights, hyperparameters = golden(name)
    mixer = from_official(SOURCE, {k: v.to(dtype) for k, v in weights.items()}, **hyperparameters)
    reference = tensors[f"{length}.output.kernel"]
    kernels = torch.stack(mixer.kernels(int(length[1:])))
    if reference.ndim == 2:
        reference = reference[None]
    assert error(kernels[: len(reference)], reference) <= max(2e-5, tolerance(name, dtype))
    assert len(reference) == 2 or not kernels[1].any()


@DTYPES
@EACH
def test_outputs_equal_those_of_the_released_code(name, length, dtype):
    _, output, _, tensors = run(name, length, dtype)
    assert output.dtype == dtype
    assert error(output, tensors[f"{length}.output.y"]) <= tolerance(name, dtype)


@EACH
def test_outputs_without_gradients_are_the_same(name, length):
    with torch.no_grad():
        _, output, _, tensors = run(name, length, torch.float32)
    assert error(output, tensors[f"{length}.output.y"]) <= tolerance(name, torch.float32)


@DTYPES
@EACH
def test_gradients_equal_those_of_the_released_code(name, length, dtype):
    mixer, output, given, tensors = run(name, length, dtype)
    output.square().mean().backward()
    origin = row_of(INDEX[name]["hyperparams"])
    theirs, unknown = origin.keys.to_theirs(k for k, _ in mixer.named_parameters())
    assert unknown == []
    found = {theirs[k]: origin.to_theirs(k, p.grad) for k, p in mixer.named_parameters()} | {"input.u": given.grad}
    prefix = f"{length}.grad."
    wanted = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    assert found.keys() == wanted.keys()
    limit = INDEX[name]["suggested_tolerance"]["grads_float32_implementation"] if dtype == torch.float32 else 1e-6
    for key, reference in wanted.items():
        assert found[key].shape == reference.shape, key
        assert error(found[key], reference) <= limit, key


@pytest.mark.parametrize("name", INDEX)
def test_weights_go_out_as_they_came_in(name):
    _, weights, hyperparameters = golden(name)
    mixer = from_official(SOURCE, weights, **hyperparameters)
    assert isinstance(mixer, BiSSM)
    again = to_official(mixer, SOURCE if "bidirectional" in hyperparameters else "state-spaces/s4d")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[k], weights[k]) for k in weights)


def test_the_short_form_has_a_name_of_its_own_too():
    _, weights, hyperparameters = golden("s4d_standalone.safetensors")
    one, other = (
        from_official(SOURCE, weights, **hyperparameters),
        from_official("state-spaces/s4d", weights, d_model=6, d_state=16),
    )
    assert (
        one.config == other.config == BiSSMConfig(state_size=16, bidirectional=False, trained_input=False, output="glu")
    )
    assert not set(MAPS) & set(LAYERS)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"d_state": 18}, CheckpointError, "these weights are not those of state-spaces/s4"),
        ({"bidirectional": True}, CheckpointError, "missing"),
        ({"d_state": 15}, ConfigError, "state_size 15: states come in conjugate pairs"),
        ({"d_model": 0}, ConfigError, "d_model 0 must be at least 1"),
        ({"d_modle": 4}, ConfigError, "unknown hyper-parameter 'd_modle'; did you mean 'd_model'"),
    ],
)
def test_weights_and_hyperparameters_that_do_not_fit_are_refused(changes, kind, message):
    _, weights, hyperparameters = golden("s4d_standalone.safetensors")
    with pytest.raises(kind, match=message):
        from_official(SOURCE, weights, **hyperparameters | changes)


def test_an_unknown_init_or_discretization_is_refused_in_one_line():
    _, weights, hyperparameters = golden("s4_bidirectional_zoh.safetensors")
    for change in ({"init": "nplr"}, {"disc": "dss"}):
        with pytest.raises(
            ConfigError, match="expected one of diag, diag-lin, diag-inv, diag-legs, and zoh or bilinear"
        ):
            from_official(SOURCE, weights, **hyperparameters | change)


@pytest.mark.parametrize(
    ("source", "config", "said"),
    [
        (SOURCE, BiSSMConfig(output="glu"), "shared_dynamics=False"),
        (SOURCE, BiSSMConfig(shared_dynamics=True), "output='linear'"),
        ("state-spaces/s4d", BiSSMConfig(bidirectional=False, output="glu"), "no name for input_vector"),
        (
            "state-spaces/s4d",
            BiSSMConfig(bidirectional=False, trained_input=False, output="glu", discretization="bilinear"),
            "bilinear",
        ),
        (None, BiSSMConfig(), "'bi_ssm' has 2 released forms"),
    ],
)
def test_mixers_that_were_never_released_do_not_go_out(source, config, said):
    with pytest.raises(ConfigError, match=said):
        to_official(build_mixer(config, 8), source)
