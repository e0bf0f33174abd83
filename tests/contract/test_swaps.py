"""Any mixer in any backbone: a swap is one field of the config, and the network stays whole."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smalti.config import from_dict, to_dict
from smalti.models import BACKBONES, BackboneConfig, DiffuSSMConfig, DiTConfig, DRWKVConfig, UDiTConfig, build_backbone
from smalti.nn.mixers import MIXERS, AttentionConfig, BiSSMConfig, BiWKVConfig, DownsampledAttentionConfig
from smalti.presets import preset_config

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

HERE = Path(__file__).parent
MIXER_CONFIGS = {
    "attention": AttentionConfig(num_heads=2),
    "bi_ssm": BiSSMConfig(state_size=8),
    "bi_wkv": BiWKVConfig(),
    "downsampled_attention": DownsampledAttentionConfig(num_heads=2),
}
SHARED = {"sample_size": (8, 8), "in_channels": 3, "num_classes": 5}
BACKBONE_CONFIGS = {
    "dit": DiTConfig(hidden_size=16, depth=2, mixer=MIXER_CONFIGS["attention"], patch_size=2, **SHARED),
    "diffussm": DiffuSSMConfig(hidden_size=16, depth=2, **SHARED),
    "drwkv": DRWKVConfig(hidden_size=16, depth=3, patch_size=2, **SHARED),
    "udit": UDiTConfig(hidden_size=8, depth=(1, 0, 1, 0, 1), mixer=MIXER_CONFIGS["attention"], **SHARED),
}
# Which mixers are linear in tokens is for the costs; what each backbone's own is, for the papers.
OWN = {"dit": "attention", "diffussm": "bi_ssm", "drwkv": "bi_wkv", "udit": "downsampled_attention"}
SWAPS = pytest.mark.parametrize(
    ("backbone", "mixer"), [pytest.param(b, m, id=f"{b}-{m}") for b, m in itertools.product(BACKBONES, MIXERS)]
)


def swapped(backbone, mixer):
    return replace(BACKBONE_CONFIGS[backbone], mixer=MIXER_CONFIGS[mixer])


def scrambled(network):
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return network


def inputs(size=(8, 8), dtype=torch.float32):
    return torch.randn(2, 3, *size, dtype=dtype), 1000 * torch.rand(2), torch.tensor([1, 5])


def test_every_backbone_and_every_mixer_is_swapped():
    assert set(BACKBONE_CONFIGS) == set(BACKBONES) == set(OWN)
    assert set(MIXER_CONFIGS) == set(MIXERS)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_backbone_s_presets_keep_the_mixer_of_their_paper(backbone):
    name = {"dit": "dit-s-2", "diffussm": "diffussm-s", "drwkv": "drwkv-s-2", "udit": "udit-s"}[backbone]
    assert preset_config(name).mixer.kind == OWN[backbone]


@SWAPS
def test_a_swapped_network_starts_at_zero_and_keeps_any_size(backbone, mixer):
    config = swapped(backbone, mixer)
    network = build_backbone(config)
    assert network(*inputs()).abs().max() == 0
    for size in ((8, 8), (8, 16), (16, 8)):
        output = scrambled(network)(*inputs(size))
        assert output.shape == (2, 6, *size)
        assert output.isfinite().all()
        assert output.abs().max() > 0


@SWAPS
def test_gradients_reach_every_weight_of_a_swapped_network(backbone, mixer):
    network = scrambled(build_backbone(swapped(backbone, mixer)))
    network(*inputs((16, 16))).square().sum().backward()
    silent = [
        name for name, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # Rows of the label table that no image of this batch has, and nothing else.
    assert silent == []


@SWAPS
def test_images_of_a_batch_do_not_see_each_other_in_a_swapped_network(backbone, mixer):
    network = scrambled(build_backbone(swapped(backbone, mixer))).double()
    latents, timesteps, labels = inputs(dtype=torch.float64)
    both = network(latents, timesteps, labels)
    for i in range(2):
        alone = network(latents[i : i + 1], timesteps[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone, both[i : i + 1])


@SWAPS
def test_a_swapped_config_goes_through_data_and_back(backbone, mixer):
    config = swapped(backbone, mixer)
    assert from_dict(BackboneConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.long
@SWAPS
def test_a_block_of_a_swapped_network_compiles_as_one_graph(backbone, mixer):
    if mixer == OWN[backbone]:
        pytest.skip("compiled by the contract of backbones")
    run = subprocess.run(
        [sys.executable, HERE / "compile_blocks.py", json.dumps(to_dict(swapped(backbone, mixer)))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "tensors agree" in run.stdout
