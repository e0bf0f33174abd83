"""Inference forms: the same function as the network, on all backbones with all mixers, plain and compiled."""

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import scramble

from smalti.errors import ConfigError
from smalti.models import (
    DiffuSSMConfig,
    DiTConfig,
    DRWKVConfig,
    UDiTConfig,
    build_backbone,
    compile_refusal,
    inference_form,
)
from smalti.nn.conditioning import AdaLN
from smalti.nn.mixers import AttentionConfig, BiSSMConfig, BiWKVConfig, DownsampledAttentionConfig

ROOT = Path(__file__).parents[2]
SHARED = {"sample_size": (8, 8), "in_channels": 3, "num_classes": 5}
MIXERS = {
    "attention": AttentionConfig(num_heads=2),
    "bi_ssm": BiSSMConfig(state_size=8),
    "bi_wkv": BiWKVConfig(),
    "downsampled": DownsampledAttentionConfig(num_heads=2),
}
BACKBONES = {
    "dit": lambda **more: DiTConfig(hidden_size=32, depth=2, **SHARED, **more),
    "diffussm": lambda **more: DiffuSSMConfig(hidden_size=32, depth=2, patch_size=2, **SHARED, **more),
    "drwkv": lambda **more: DRWKVConfig(hidden_size=32, depth=3, **SHARED, **more),
    "udit": lambda **more: UDiTConfig(hidden_size=16, depth=(1, 1, 1, 1, 1), **SHARED, **more),
}
ALL = pytest.mark.parametrize(("kind", "mixer"), [(k, m) for k in BACKBONES for m in MIXERS])


def build(kind, mixer="attention", **more):
    network = build_backbone(BACKBONES[kind](mixer=MIXERS[mixer], **more))
    scramble(network)
    return network


def inputs(batch=3, size=8):
    generator = torch.Generator().manual_seed(5)
    timesteps = 1000 * torch.rand(batch, generator=generator)
    return torch.randn(batch, 3, size, size, generator=generator), timesteps, torch.arange(batch) % 6


@torch.no_grad()
def exact(network, latents, timesteps, labels):
    return copy.deepcopy(network).double()(latents.double(), timesteps, labels)


def error(output, truth):
    return ((output.double() - truth).norm() / truth.norm()).item()


@ALL
def test_the_float32_form_is_as_near_to_the_truth_as_the_network_itself(kind, mixer):
    network = build(kind, mixer)
    truth = exact(network, *inputs())
    with torch.no_grad():
        own = error(network(*inputs()), truth)
    assert own < 2e-6
    assert error(inference_form(network)(*inputs()), truth) < 2 * own + 1e-7


@ALL
def test_the_bfloat16_form_is_off_by_about_a_per_cent(kind, mixer):
    network = build(kind, mixer)
    output = inference_form(network, dtype=torch.bfloat16)(*inputs())
    assert output.dtype == torch.bfloat16
    assert 1e-4 < error(output, exact(network, *inputs())) < 2e-2


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "in_context", "cross_attention"])
@pytest.mark.parametrize("kind", ["dit", "diffussm", "drwkv"])
def test_every_conditioning_has_an_inference_form(kind, conditioning):
    if (kind, conditioning) == ("drwkv", "cross_attention"):
        pytest.skip("a Diffusion-RWKV has no cross-attention")
    heads = {"context_heads": 2} if conditioning == "cross_attention" else {}
    network = build(kind, "bi_ssm", conditioning=conditioning, **heads)
    form = inference_form(network)
    assert error(form(*inputs()), exact(network, *inputs())) < 2e-6
    assert not any(isinstance(module, AdaLN) for module in form.modules())


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_rows_do_not_see_each_other_and_other_sizes_work(kind):
    network, arguments = build(kind, "bi_wkv"), inputs(size=16)
    form = inference_form(network)
    truth = exact(network, *arguments)
    assert error(form(*arguments), truth) < 4e-6
    assert error(form(*(x[:1] for x in arguments)), truth[:1]) < 4e-6


def test_an_unconditional_network_and_labels_for_each_width_work():
    unconditional = build_backbone(
        DiTConfig(hidden_size=32, depth=1, mixer=MIXERS["bi_wkv"], in_channels=3, num_classes=0)
    )
    scramble(unconditional)
    latents, timesteps, _ = inputs()
    assert (
        error(inference_form(unconditional)(latents, timesteps), exact(unconditional, latents, timesteps, None)) < 2e-6
    )
    network, labels = build("udit"), torch.tensor([[0, 1, 2], [3, 4, 5], [5, 0, 1]])
    assert error(inference_form(network)(latents, timesteps, labels), exact(network, latents, timesteps, labels)) < 2e-6


@pytest.mark.parametrize("kind", list(BACKBONES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_and_its_form_do_not_touch_each_other(kind, dtype):
    network = build(kind, "bi_ssm").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trained = [p.requires_grad for p in network.parameters()]
    form = inference_form(network, dtype=dtype)
    output = form(*inputs())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == trained
    assert network.training
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert torch.equal(form(*inputs()), output)
    assert not output.requires_grad
    assert form.config == network.config


def test_exponents_over_the_whole_sequence_stay_float32():
    for mixer, names in {
        "bi_wkv": {"decay", "bonus"},
        "bi_ssm": {"log_dt", "frequency"},
        "downsampled": {"scale"},
    }.items():
        form = inference_form(build("dit", mixer), dtype=torch.bfloat16)
        dtypes = {name.rpartition(".")[2]: p.dtype for name, p in form.named_parameters()}
        assert {dtypes[name] for name in names} == {torch.float32}
        assert dtypes["weight"] == dtypes["position"] == torch.bfloat16


def test_wrong_requests_are_told_what_there_is():
    network = build("dit")
    with pytest.raises(ConfigError, match=r"torch\.float16: choose torch\.float32 or torch\.bfloat16"):
        inference_form(network, dtype=torch.float16)
    with pytest.raises(TypeError, match="Linear has no backbone config"):
        inference_form(torch.nn.Linear(2, 2))


def test_without_a_compiler_the_form_is_eager_and_a_warning_says_so(monkeypatch, caplog):
    monkeypatch.setattr(
        "smalti.models.inference.compile_refusal", lambda device: "there is no C++ compiler: install one"
    )
    network = build("dit")
    with caplog.at_level(logging.WARNING, logger="smalti"):
        form = inference_form(network, mode="frozen")
    assert caplog.messages == ["inference runs uncompiled, which is slower: there is no C++ compiler: install one"]
    assert form.mode == "eager"
    assert error(form(*inputs()), exact(network, *inputs())) < 2e-6


COMPILED = """
import os, sys, torch
from smalti.models import compile_refusal, inference_form
sys.path[:0] = ["tests/models", "tests/support"]
from test_inference import build, error, exact, inputs

torch.set_num_threads(1)
forms = []
for mode in ("frozen", "compiled"):
    for seed in (0, 1):  # the second network must not get the first one's constants
        network = build("dit", "bi_wkv")
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * seed)
        forms.append((inference_form(network, mode=mode), exact(network, *inputs())))
forms.append((inference_form(network, dtype=torch.bfloat16, mode="frozen"), exact(network, *inputs())))
for _ in range(2):
    for form, truth in forms:
        assert error(form(*inputs()), truth) < (2e-2 if form.dtype == torch.bfloat16 else 2e-6)
        assert torch.equal(form(*inputs()), form(*inputs()))
form, _ = forms[0]
assert form(*inputs(batch=2)).shape == (2, 6, 8, 8)
kept = {"drwkv": "bi_ssm", "udit": "downsampled"}  # with ops that compiled code calls as they are
for kind, mixer in kept.items():
    network = build(kind, mixer)
    form, truth = inference_form(network, mode="compiled"), exact(network, *inputs())
    for _ in range(2):
        assert error(form(*inputs()), truth) < 2e-6
    with torch.profiler.profile() as profile:
        form(*inputs())
    assert "smalti::whole" in {event.key for event in profile.key_averages()}
os.environ["PATH"] = ""
torch._inductor.config.cpp.cxx = ("/no/such/compiler",)
torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
print("refused:", compile_refusal(torch.device("cpu")))
"""


@pytest.mark.long
def test_compiled_and_frozen_forms_agree_and_networks_do_not_share_constants():
    """In a process of its own: importing the compiler makes torch warn about itself."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, env=None, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "refused: there is no C++ compiler: install one, such as g++ or clang++\n"


def test_asking_for_a_compiler_needs_none_where_the_device_has_none():
    assert "cpu and cuda only" in compile_refusal(torch.device("meta"))
