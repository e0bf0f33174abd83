"""The door of backbones: one signature, and what everything built on it relies on."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from smalti.config import from_dict, to_dict
from smalti.errors import ConfigError
from smalti.models import (
    BACKBONES,
    Backbone,
    BackboneConfig,
    DiffuSSMConfig,
    DiTConfig,
    DRWKVConfig,
    UDiTConfig,
    build_backbone,
)
from smalti.nn.mixers import (
    AttentionConfig,
    DownsampledAttentionConfig,
)

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

HERE = Path(__file__).parent
SHARED = {"sample_size": (8, 8), "in_channels": 3, "num_classes": 5}
# One small config per backbone: a new backbone adds its line here and gets every test below.
CONFIGS = {
    "dit": DiTConfig(hidden_size=32, depth=2, mixer=AttentionConfig(num_heads=4), **SHARED),
    "drwkv": DRWKVConfig(hidden_size=32, depth=3, **SHARED),
    "diffussm": DiffuSSMConfig(hidden_size=32, depth=2, patch_size=2, **SHARED),
    "udit": UDiTConfig(hidden_size=16, depth=(1, 1, 1, 1, 1), mixer=DownsampledAttentionConfig(num_heads=2), **SHARED),
}
# A trained position table belongs to one size, and is stretched for others: tests/models/test_drwkv.py.
ANY_SIZE = {"drwkv": {"position": "frozen"}}
KINDS = pytest.mark.parametrize("kind", BACKBONES)


def build(kind, **changes):
    return build_backbone(from_dict(BackboneConfig, to_dict(CONFIGS[kind]) | changes))


def scrambled(network):
    """Every trainable weight random, so that nothing is hidden behind a zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return network


def inputs(size=(8, 8), batch=2, dtype=torch.float32):
    latents = torch.randn(batch, 3, *size, dtype=dtype)
    return latents, 1000 * torch.rand(batch), torch.arange(batch) % 6


def test_every_backbone_of_the_table_is_tested():
    assert set(CONFIGS) == set(BACKBONES)
    for kind, entry in BACKBONES.items():
        assert entry.config.kind == kind
        assert type(CONFIGS[kind]) is entry.config


@KINDS
def test_the_signature_is_the_contract_s(kind):
    expected = inspect.signature(Backbone.__call__)
    got = inspect.signature(BACKBONES[kind].module.forward)
    assert [(p.name, p.default) for p in got.parameters.values()] == [
        (p.name, p.default) for p in expected.parameters.values()
    ]
    network = build(kind)
    assert network.config == CONFIGS[kind]


@KINDS
@pytest.mark.parametrize("learned_variance", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_output_has_the_size_of_the_latents_and_the_channels_of_the_config(kind, learned_variance, batch):
    network = build(kind, learned_variance=learned_variance)
    output = network(*inputs(batch=batch))
    assert output.shape == (batch, 6 if learned_variance else 3, 8, 8)
    assert output.shape[1] == network.config.out_channels
    assert output.dtype == torch.float32


@KINDS
@pytest.mark.parametrize("size", [(8, 16), (16, 8), (24, 8), (16, 16)])
def test_other_sizes_and_sizes_that_are_not_square_work(kind, size):
    network = scrambled(build(kind))
    output = network(*inputs(size))
    assert output.shape == (2, 6, *size)
    assert output.isfinite().all()


@KINDS
@pytest.mark.parametrize("size", [(8, 16), (16, 8)])
def test_a_network_made_for_a_size_agrees_with_one_that_is_only_shown_it(kind, size):
    changes = ANY_SIZE.get(kind, {})
    network, arguments = scrambled(build(kind, **changes)).double(), inputs(size, dtype=torch.float64)
    made_for_it = build(kind, sample_size=list(size), **changes).double()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    missing = made_for_it.load_state_dict({k: v for k, v in network.state_dict().items() if k in trained}, strict=False)
    assert not trained & set(missing.missing_keys)
    torch.testing.assert_close(network(*arguments), made_for_it(*arguments), rtol=1e-6, atol=1e-6)  # float32 table


@KINDS
def test_the_output_is_zero_at_the_start(kind):
    assert build(kind)(*inputs()).abs().max() == 0


@KINDS
def test_gradients_reach_every_trainable_weight_within_three_steps(kind):
    network = build(kind)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    reached = set()
    for _ in range(3):  # what starts behind a zero gate behind a zero head hears of it at the third
        optimizer.zero_grad()
        latents, timesteps, labels = inputs((16, 16), batch=6)  # among one token attention has nothing to learn
        output = network(latents, timesteps, labels)
        (output - torch.randn_like(output)).square().mean().backward()
        reached = {name for name, p in network.named_parameters() if p.grad is not None and (p.grad != 0).any()}
        optimizer.step()
    assert reached == {name for name, p in network.named_parameters() if p.requires_grad}
    assert all(p.isfinite().all() for p in network.parameters())


@KINDS
def test_the_input_timesteps_and_labels_all_matter(kind):
    network = scrambled(build(kind)).double()
    latents, timesteps, labels = inputs(dtype=torch.float64)
    output = network(latents, timesteps, labels)
    for other in (
        network(latents + 0.1, timesteps, labels),
        network(latents, timesteps + 1, labels),
        network(latents, timesteps, (labels + 1) % 6),
    ):
        assert ((output - other).abs().amax(dim=(1, 2, 3)) > 1e-6).all()


@KINDS
def test_images_of_a_batch_do_not_see_each_other(kind):
    network, (latents, timesteps, labels) = scrambled(build(kind)).double(), inputs(batch=3, dtype=torch.float64)
    together = network(latents, timesteps, labels)
    for i in range(3):
        alone = network(latents[i : i + 1], timesteps[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1])
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(network(latents[order], timesteps[order], labels[order]), together[order])


@KINDS
def test_whole_and_float_timesteps_are_the_same(kind):
    network, (latents, _, labels) = scrambled(build(kind)), inputs()
    assert torch.equal(
        network(latents, torch.tensor([3, 999]), labels), network(latents, torch.tensor([3.0, 999.0]), labels)
    )


@KINDS
def test_an_unconditional_network_takes_no_labels(kind):
    network = scrambled(build(kind, num_classes=0))
    latents, timesteps, labels = inputs()
    assert network(latents, timesteps).shape == (2, 6, 8, 8)
    assert torch.equal(network(latents, timesteps, None), network(latents, timesteps))
    with pytest.raises(ValueError, match="class_labels=None"):
        network(latents, timesteps, labels)
    with pytest.raises(ValueError, match="class_labels is missing"):
        build(kind)(latents, timesteps)


@KINDS
@pytest.mark.parametrize(
    ("shape", "timesteps", "message"),
    [
        ((2, 4, 8, 8), 2, r"latents of shape \(2, 4, 8, 8\): expected \(B, 3, H, W\)"),
        ((2, 3, 7, 8), 2, r"latents of shape \(2, 3, 7, 8\): .* divisible by"),
        ((2, 3, 8, 7), 2, r"latents of shape \(2, 3, 8, 7\): .* divisible by"),
        ((3, 8, 8), 3, r"latents of shape \(3, 8, 8\): expected \(B, 3, H, W\)"),
        ((2, 3, 8, 8), 1, r"timesteps of shape \(1,\): expected one per image, 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(no_shape_checks, kind, shape, timesteps, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(kind)(torch.zeros(shape), torch.zeros(timesteps), torch.zeros(timesteps, dtype=torch.int64))
    assert "\n" not in str(caught.value)


@KINDS
def test_float64_agrees_with_float32(kind):
    network, (latents, timesteps, labels) = scrambled(build(kind)), inputs()
    single = network(latents, timesteps, labels)
    double = network.double()(latents.double(), timesteps, labels)
    assert double.dtype == torch.float64
    assert ((single - double).abs().max() / double.abs().max()).item() < 1e-5


@KINDS
def test_bfloat16_weights_run_and_stay_close(kind):
    network, (latents, timesteps, labels) = scrambled(build(kind)), inputs()
    full = network(latents, timesteps, labels)
    half = network.bfloat16()(latents.bfloat16(), timesteps, labels)
    assert half.dtype == torch.bfloat16
    assert ((half - full).abs().max() / full.abs().max()).item() < 0.1


@KINDS
def test_train_and_eval_are_the_same_function_without_randomness(kind):
    network, arguments = scrambled(build(kind)), inputs()
    before = torch.random.get_rng_state()
    with torch.no_grad():
        outputs = [network.train(mode)(*arguments) for mode in (True, False, True, False)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(before, torch.random.get_rng_state())


@KINDS
def test_a_forward_pass_changes_no_weight_and_no_input(kind):
    network, arguments = scrambled(build(kind)), inputs()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    given = [x.clone() for x in arguments]
    network(*arguments).sum().backward()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(given, arguments, strict=True))


@KINDS
def test_weights_and_config_go_to_a_file_and_back(kind, tmp_path):
    network, arguments = scrambled(build(kind)), inputs()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(network.config)))
    again = build_backbone(from_dict(BackboneConfig, json.loads((tmp_path / "config.json").read_text())))
    assert again.config == network.config
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    assert torch.equal(again(*arguments), network(*arguments))


@KINDS
def test_the_same_seed_builds_the_same_network(kind):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build(kind).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@KINDS
def test_multiply_adds_are_countable_without_memory_and_grow_with_the_batch(kind):
    with torch.device("meta"):
        network, counts = build(kind), []
        if hasattr(network, "fuse"):
            network = network.fuse()  # else it multiplies weights with each other, once for every batch
        for batch in (1, 2):
            labels = torch.zeros(batch, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter:
                network(torch.empty(batch, 3, 8, 8), torch.empty(batch), labels)
            counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0] > 0
    parameters = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    assert counts[0] / 2 > parameters / 2  # every matrix is used at least once, but for a look-up of one row


@KINDS
def test_blocks_can_be_walked_and_are_most_of_the_network(kind):
    network = build(kind)
    blocks = list(network.iter_blocks())
    depth = network.config.depth
    assert len(blocks) == len(set(map(id, blocks))) == (depth if isinstance(depth, int) else sum(depth))
    assert {id(b) for b in blocks} <= {id(m) for m in network.modules()}
    assert sum(p.numel() for b in blocks for p in b.parameters()) > 0.5 * sum(p.numel() for p in network.parameters())


@KINDS
@pytest.mark.slow
def test_a_block_compiles_as_one_graph_with_the_same_outputs_and_gradients(kind):
    run = subprocess.run(
        [sys.executable, HERE / "compile_blocks.py", json.dumps(to_dict(CONFIGS[kind]))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )
    assert run.returncode == 0, run.stderr
    assert "tensors agree" in run.stdout


@KINDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 0}, "in_channels 0"),
        ({"num_classes": -1}, "num_classes -1"),
        ({"sample_size": [0, 8]}, "sample_size 0x8"),
        ({"sample_size": [8]}, r"config\.sample_size: expected 2 values, got 1"),
        ({"learned_variance": "yes"}, r"config\.learned_variance: expected bool, got 'yes'"),
        ({"learn_variance": True}, r"unknown setting 'learn_variance'; did you mean 'learned_variance'\?"),
        ({"depth": 0}, "depth.* 0"),
    ],
)
def test_wrong_settings_are_config_errors_in_one_line(kind, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(kind, **change)
    assert "\n" not in str(caught.value)


def test_an_unknown_backbone_is_answered_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"model: unknown kind 'dti'; did you mean 'dit'\?"):
        from_dict(BackboneConfig, {"kind": "dti"}, "model")
