"""The mixer of examples/04_add_a_mixer.py, which docs/adding/mixer.md walks through, is one that others may copy."""

import runpy
from pathlib import Path

import pytest
import torch

from smalti.config import from_dict, to_dict
from smalti.errors import ConfigError
from smalti.models import DiTConfig, build_backbone
from smalti.nn.layers import Grid
from smalti.nn.mixers import MIXERS, MixerConfig, build_mixer

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

ROOT = Path(__file__).parents[2]
KIND = "gated_linear_attention"


@pytest.fixture(scope="module")
def example():
    before = dict(MIXERS)
    yield runpy.run_path(str(ROOT / "examples" / "04_add_a_mixer.py"))
    MIXERS.clear()
    MIXERS.update(before)


def config(example):
    return example["GatedLinearAttentionConfig"](num_heads=4)


def test_it_is_short_and_registered_in_one_line(example):
    text = (ROOT / "examples" / "04_add_a_mixer.py").read_text()
    mixer = text[text.index("@dataclass") : text.index("MIXERS[")].strip()
    assert len(mixer.splitlines()) <= 30
    assert text.count("MIXERS[") == 1
    assert MIXERS[KIND] == (example["GatedLinearAttentionConfig"], example["GatedLinearAttention"])


def test_it_is_linear_attention_with_a_gate(example):
    mixer, x = build_mixer(config(example), 8).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    q, k, v = (part.view(2, 6, 4, 2).transpose(1, 2) for part in mixer.qkv(x).split(8, dim=-1))
    weights = q.softmax(dim=3) @ k.softmax(dim=2).mT  # what is never made: N x N
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 4, 6, dtype=torch.float64))
    expected = mixer.out(mixer.gate(x).sigmoid() * (weights @ v).transpose(1, 2).reshape(2, 6, 8))
    torch.testing.assert_close(mixer(x, Grid(2, 3)), expected)


def test_it_keeps_the_contract_of_mixers(example):
    mixer = build_mixer(config(example), 32).double()
    x = torch.randn(3, 12, 32, dtype=torch.float64, requires_grad=True)
    output = mixer(x, Grid(3, 4))
    assert output.shape == x.shape
    (gradient,) = torch.autograd.grad(output[0, 5].sum(), x, retain_graph=True)
    assert (gradient[0] != 0).any(dim=1).all()  # every token is seen
    assert (gradient[1:] == 0).all()  # and no other image
    output.square().sum().backward()
    assert all((p.grad != 0).any() for p in mixer.parameters())


def test_it_takes_in_context_tokens_inside_dit(example):
    settings = {"hidden_size": 32, "depth": 1, "sample_size": (8, 4), "num_classes": 3, "conditioning": "in_context"}
    model = build_backbone(DiTConfig(mixer=config(example), **settings))
    with torch.no_grad():
        output = model(torch.randn(2, 4, 8, 4), torch.tensor([1.0, 2.0]), torch.tensor([0, 3]))
    assert output.shape == (2, 8, 8, 4)


def test_its_config_is_found_by_its_kind_only_while_it_is_registered(example, monkeypatch):
    data = to_dict(config(example))
    assert data == {"kind": KIND, "num_heads": 4}
    assert from_dict(MixerConfig, data) == config(example)
    monkeypatch.delitem(MIXERS, KIND)
    with pytest.raises(ConfigError, match=f"unknown kind '{KIND}'"):
        from_dict(MixerConfig, data)
