"""DiT as diffusers' DiTTransformer2DModel, and back: the outputs of diffusers itself are the judge."""

import dataclasses
import json

import pytest
import torch

from smalti.checkpoints.diffusers import WEIGHTS, from_diffusers, to_diffusers
from smalti.errors import CheckpointError, ConfigError
from smalti.models import DiTConfig, build_backbone
from smalti.nn.mixers import AttentionConfig
from smalti.storage.tensors import file_pieces

CONFIG = DiTConfig(
    hidden_size=48, depth=3, mixer=AttentionConfig(num_heads=4), sample_size=(8, 8), in_channels=4, num_classes=10
)
CLOSED = dataclasses.replace(CONFIG, timestep_frequencies="closed")
NARROW = dataclasses.replace(CLOSED, learned_variance=False, patch_size=4, in_channels=3)


def network(config):
    model = build_backbone(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name != "position":
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(b"".join(map(bytes, file_pieces(tensors))))
    return folder


def inputs(config):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(5, config.in_channels, *config.sample_size, generator=generator)
    return latents, torch.tensor([0, 1, 500, 777, 999]), torch.tensor([0, 3, 9, 10, 5])


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def transformer():
    from diffusers.models import DiTTransformer2DModel

    return DiTTransformer2DModel


@pytest.mark.parametrize("config", [CLOSED, NARROW], ids=["learned variance", "without"])
def test_diffusers_loads_what_is_written_and_gives_the_same_outputs(tmp_path, transformer, config):
    model = network(config)
    loaded = transformer.from_pretrained(write(tmp_path, *to_diffusers(model)), low_cpu_mem_usage=False).eval()
    latents, timesteps, labels = inputs(config)
    with torch.no_grad():
        expected = loaded(latents, timesteps, labels).sample
        assert apart(model(latents, timesteps, labels), expected) <= 1e-5


def test_with_the_papers_frequencies_one_line_after_loading_gives_the_same_outputs(tmp_path, transformer):
    model = network(CONFIG)
    loaded = transformer.from_pretrained(write(tmp_path, *to_diffusers(model)), low_cpu_mem_usage=False).eval()
    latents, timesteps, labels = inputs(CONFIG)
    with torch.no_grad():
        output = model(latents, timesteps, labels)
        assert apart(loaded(latents, timesteps, labels).sample, output) > 1e-3  # else the line were not needed
        for block in loaded.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        assert apart(loaded(latents, timesteps, labels).sample, output) <= 1e-5


@pytest.mark.parametrize("learned_variance", [True, False])
def test_what_diffusers_saves_is_read_and_gives_the_same_outputs(tmp_path, transformer, learned_variance):
    torch.manual_seed(0)
    theirs = transformer(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8 if learned_variance else None,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    first = theirs.transformer_blocks[0].norm1.emb
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    theirs.save_pretrained(tmp_path)
    got = from_diffusers(tmp_path)
    assert "half_open" in got.notes[0]
    latents, timesteps, labels = inputs(CONFIG)
    with torch.no_grad():
        expected = theirs(latents, timesteps, labels).sample
        assert apart(got.model(latents, timesteps, labels), expected) <= 1e-5
    config, tensors = to_diffusers(got.model)
    state = theirs.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert config["out_channels"] == (8 if learned_variance else 4)


@pytest.mark.parametrize("config", [CONFIG, CLOSED, NARROW], ids=["papers", "closed", "narrow"])
def test_a_network_goes_there_and_back_bit_for_bit(tmp_path, config):
    model = network(config)
    got = from_diffusers(write(tmp_path, *to_diffusers(model)))
    assert got.notes == ()
    assert got.model.config == config
    assert not got.model.training
    assert all(torch.equal(v, got.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_frequencies_can_be_said_where_the_folder_does_not(tmp_path):
    config, tensors = to_diffusers(network(CLOSED))
    del config["_smalti_timestep_frequencies"]
    folder = write(tmp_path, config, tensors)
    assert from_diffusers(folder).model.config.timestep_frequencies == "closed"
    got = from_diffusers(folder, timestep_frequencies="half_open")
    assert got.model.config.timestep_frequencies == "half_open"
    assert got.notes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning": "adaln"}, "conditioning 'adaln'"),
        ({"conditioning": "cross_attention"}, "conditioning 'cross_attention'"),
        ({"sample_size": (8, 4)}, "sample_size of 8x4"),
        ({"num_classes": 0}, "without classes"),
        ({"null_class": False}, "without a null class"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 2.0"),
        ({"position": "table"}, "position table"),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express_is_one_clear_line(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        to_diffusers(network(dataclasses.replace(CONFIG, **change)))
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_dit_is_refused():
    with pytest.raises(ConfigError, match="only for a DiT"):
        to_diffusers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "describes 'UNet2DModel'"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"norm_eps": 1e-3}, "norm_eps is 0.001"),
        ({"cross_attention_dim": 768}, "cross_attention_dim is 768"),
        ({"num_layers": "3"}, "num_layers is '3'"),
        ({"num_layers": 2}, "tensors missing|unexpected"),
        ({"out_channels": 5}, "out_channels is 5"),
        ({"patch_size": 3}, "cannot be cut into patches"),
        ({"num_embeds_ada_norm": 11}, "of another shape"),
    ],
    ids=str,
)
def test_a_folder_of_another_network_is_refused(tmp_path, change, message):
    config, tensors = to_diffusers(network(CLOSED))
    with pytest.raises(CheckpointError, match=message):
        from_diffusers(write(tmp_path, config | change, tensors))


def test_copies_that_were_trained_apart_are_refused(tmp_path):
    config, tensors = to_diffusers(network(CLOSED))
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 3] += 1e-3
    with pytest.raises(CheckpointError, match="block 2 has another norm1"):
        from_diffusers(write(tmp_path, config, tensors))


def test_a_default_of_diffusers_that_a_dit_has_not_is_told(tmp_path):
    config, tensors = to_diffusers(network(CLOSED))
    del config["norm_eps"]
    (note,) = from_diffusers(write(tmp_path, config, tensors)).notes
    assert "1e-5" in note


def test_a_folder_that_lacks_a_file_or_is_a_whole_pipeline_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        from_diffusers(tmp_path)
    write(tmp_path / "transformer", *to_diffusers(network(CLOSED)))
    with pytest.raises(CheckpointError, match="give that"):
        from_diffusers(tmp_path)
