"""U-DiT: its topology and conditions, the fused form, three labels, other mixers, and its refusals.

Whole networks with released weights are held against the released code in tests/checkpoints/test_official_udit.py.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from smalti.config import from_dict, to_dict
from smalti.errors import ConfigError
from smalti.models import BackboneConfig, UDiT, UDiTConfig, build_backbone
from smalti.models.udit import ReparameterizedMLP
from smalti.nn.layers import Grid
from smalti.nn.mixers import AttentionConfig, DownsampledAttentionConfig
from smalti.nn.plane import as_plane, as_tokens

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

MIXER = DownsampledAttentionConfig(num_heads=2)
SMALL = {"hidden_size": 8, "depth": (1, 1, 1, 1, 1), "mixer": MIXER, "sample_size": (16, 16), "num_classes": 5}


def build(**changes):
    return UDiT(UDiTConfig(**SMALL | changes))


def scrambled(network, std=0.3):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std)
    return network.double()


def inputs(size=(16, 16), batch=2):
    return torch.randn(batch, 4, *size, dtype=torch.float64), 1000 * torch.rand(batch), torch.tensor([1, 5])[:batch]


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# --- topology


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_the_five_stages_are_wired_as_the_paper_says(size):
    """Sec. 3.1 and the released widths, with the stages and conditions of the network itself."""
    network = scrambled(build())
    latents, timesteps, labels = inputs(size)
    conds = [part(timesteps, labels).sum(1) for part in network.conditioning]
    assert [c.shape[-1] for c in conds] == [8, 16, 32]

    def stage(i, x, cond):
        grid = Grid(*x.shape[2:])
        tokens = as_tokens(x)
        for block in network.stages[i]:
            tokens = block(tokens, cond, grid)
        return as_plane(tokens, grid)

    def conv(layer, x):
        return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    enc1 = stage(0, conv(network.embed, latents), conds[0])
    enc2 = stage(1, F.pixel_unshuffle(conv(network.down[0], enc1), 2), conds[1])
    bottom = stage(2, F.pixel_unshuffle(conv(network.down[1], enc2), 2), conds[2])
    up2 = torch.cat([F.pixel_shuffle(conv(network.up[0], bottom), 2), enc2], dim=1)
    dec2 = stage(3, conv(network.join[0], up2), conds[1])
    up1 = torch.cat([F.pixel_shuffle(conv(network.up[1], dec2), 2), enc1], dim=1)
    dec1 = conv(network.head.conv, stage(4, conv(network.join[1], up1), conds[1]))
    assert [x.shape[1] for x in (enc1, enc2, bottom, dec2, dec1)] == [8, 16, 32, 16, 16]
    shift, scale = network.head.modulation.linear(F.silu(conds[1]))[..., None, None].chunk(2, dim=1)
    mean, variance = dec1.mean(1, keepdim=True), dec1.var(1, unbiased=False, keepdim=True)
    expected = conv(network.head.out, (dec1 - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift)
    torch.testing.assert_close(network(latents, timesteps, labels), expected, rtol=1e-9, atol=1e-9)


def test_a_block_is_two_layers_of_two_gated_branches():
    network = scrambled(build())
    block, grid = network.stages[1][0], Grid(4, 6)
    x, cond = torch.randn(2, 24, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    expected = x
    for layer in block.layers:
        parts = layer.modulation.linear(F.silu(cond))[:, None].chunk(6, dim=-1)
        for (shift, scale, gate), branch in zip((parts[:3], parts[3:]), (layer.mixer, layer.mlp), strict=True):
            normed = F.layer_norm(expected, (16,), eps=1e-6)
            expected = expected + gate * branch(normed * (1 + scale) + shift, grid)
    torch.testing.assert_close(block(x, cond, grid), expected)
    branches = tuple(part for layer in block.layers for part in (layer.mixer, layer.mlp))
    assert block.branches() == branches


def test_blocks_are_walked_in_order_and_stages_may_be_empty():
    network = build(depth=(2, 0, 3, 1, 0))
    assert [len(stage) for stage in network.stages] == [2, 0, 3, 1, 0]
    assert list(network.iter_blocks()) == [block for stage in network.stages for block in stage]
    latents, timesteps, labels = inputs()
    assert network(latents.float(), timesteps, labels).shape == (2, 8, 16, 16)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln"])
def test_the_network_starts_by_saying_zero_and_a_gated_block_as_the_identity(conditioning):
    network = build(conditioning=conditioning)
    latents, timesteps, labels = inputs()
    assert network(latents.float(), timesteps, labels).abs().max() == 0
    x = torch.randn(2, 64, 8)
    assert torch.equal(network.stages[0][0](x, torch.randn(2, 8), Grid(8, 8)), x) is (conditioning == "adaln_zero")


# --- MLP and fused form


@pytest.mark.parametrize(("rows", "batch"), [(2, 1), (8, 3)])
def test_the_mlp_is_its_branches_written_out(rows, batch):
    mlp = scrambled(ReparameterizedMLP(8, 16))
    grid = Grid(rows, 4)
    x = torch.randn(batch, grid.tokens, 8, dtype=torch.float64)
    z = F.gelu(mlp.in2(mlp.in1(x)))
    z = z + mlp.depthwise5(z, grid) + mlp.depthwise3(z, grid) + mlp.depthwise1(z, grid)
    torch.testing.assert_close(mlp(x, grid), mlp.out2(mlp.out1(z)), rtol=1e-10, atol=1e-10)


def test_two_layers_are_multiplied_only_where_there_are_enough_tokens(monkeypatch):
    import smalti.models.udit as module

    products = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda first, second: products.append(1) or product(first, second))
    mlp = ReparameterizedMLP(8, 16)
    mlp(torch.randn(1, 16, 8), Grid(4, 4))  # 16 tokens: both ways cost the same
    assert len(products) == 0
    mlp(torch.randn(1, 20, 8), Grid(4, 5))
    assert len(products) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer": AttentionConfig(num_heads=2)},
        {"mlp": "basic"},
        {"mlp": "depthwise"},
        {"mixer": replace(MIXER, cosine=False, position="none", downsampler="dwconv3"), "learned_variance": False},
        {"conditioning": "adaln", "num_classes": 0},
    ],
    ids=str,
)
def test_fuse_gives_a_new_network_that_computes_the_same(changes):
    network = scrambled(build(**changes)).train()
    latents, timesteps, labels = inputs()
    labels = labels if network.config.num_classes else None
    before = copy.deepcopy(network.state_dict())
    random = torch.random.get_rng_state()
    fused = network.fuse()
    assert torch.equal(random, torch.random.get_rng_state())
    assert error(fused(latents, timesteps, labels), network(latents, timesteps, labels)) < 1e-12
    assert fused.config.mlp == ("basic" if network.config.mlp == "basic" else "depthwise")
    assert not getattr(fused.config.mixer, "shortcut", False)
    assert fused.training
    assert not network.eval().fuse().training
    # The first network is as it was, and shares no memory with the second.
    assert all(torch.equal(t, before[k]) for k, t in network.state_dict().items())
    with torch.no_grad():
        for parameter in fused.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert all(torch.equal(t, before[k]) for k, t in network.state_dict().items())


def test_a_fused_network_is_an_ordinary_one_that_can_be_built_loaded_and_trained():
    fused = scrambled(build()).fuse()
    again = build_backbone(from_dict(BackboneConfig, to_dict(fused.config))).double()
    again.load_state_dict(fused.state_dict(), strict=True)
    arguments = inputs()
    assert torch.equal(again(*arguments), fused(*arguments))
    again(*arguments).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters())
    twice = fused.fuse()
    assert twice.config == fused.config
    assert all(torch.equal(t, fused.state_dict()[k]) for k, t in twice.state_dict().items())


def test_fused_kernels_are_rounded_once():
    network = scrambled(build()).float()
    exact = copy.deepcopy(network).double().fuse().state_dict()
    for name, tensor in network.fuse().state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[name].float()), name


def test_the_gradient_of_the_trained_form_is_that_of_the_branches():
    """Through the products of weights, which autograd could lose without a word."""
    mlp, grid = scrambled(ReparameterizedMLP(4, 8)), Grid(6, 6)
    x = torch.randn(2, 36, 4, dtype=torch.float64)
    z = F.gelu(mlp.in2(mlp.in1(x)))
    z = z + mlp.depthwise5(z, grid) + mlp.depthwise3(z, grid) + mlp.depthwise1(z, grid)
    expected = torch.autograd.grad(mlp.out2(mlp.out1(z)).square().sum(), list(mlp.parameters()))
    found = torch.autograd.grad(mlp(x, grid).square().sum(), list(mlp.parameters()))
    for (name, _), a, b in zip(mlp.named_parameters(), found, expected, strict=True):
        assert error(a, b) < 1e-11, name


# --- three labels


def test_one_label_per_width_can_be_hidden_alone():
    network, (latents, timesteps, _) = scrambled(build()), inputs()
    labels = torch.tensor([1, 2])
    same = network(latents, timesteps, labels[:, None].expand(2, 3))
    assert torch.equal(same, network(latents, timesteps, labels))
    for width in range(3):
        mixed = labels[:, None].repeat(1, 3)
        mixed[0, width] = 5
        output = network(latents, timesteps, mixed)
        assert (output[0] - same[0]).abs().max() > 1e-9
        torch.testing.assert_close(output[1], same[1])
    assert network.config.label_tables == 3


def test_labels_of_another_shape_are_refused(no_shape_checks):
    network, (latents, timesteps, _) = build(), inputs()
    for shape in ((2, 2), (3, 3), (3,)):
        with pytest.raises(ValueError, match=r"class_labels of shape .*: expected one per") as caught:
            network(latents.float(), timesteps, torch.zeros(shape, dtype=torch.int64))
        assert "\n" not in str(caught.value)


# --- mixers and sizes


def test_plain_attention_makes_the_unet_of_the_paper_s_ladder():
    network = scrambled(build(mixer=AttentionConfig(num_heads=2), mlp="basic", mlp_ratio=4.0, sample_size=(12, 4)))
    latents, timesteps, labels = inputs((12, 4))
    assert network(latents, timesteps, labels).shape == (2, 8, 12, 4)
    assert network.config.divisor == 4


def test_sizes_are_refused_by_what_the_mixer_needs(no_shape_checks):
    latents, timesteps, labels = inputs((12, 8))
    with pytest.raises(ValueError, match=r"latents of shape \(2, 4, 12, 8\): .* divisible by 8"):
        build()(latents, timesteps, labels)
    with pytest.raises(ValueError, match=r"latents of shape \(2, 4, 10, 8\): .* divisible by 4"):
        build(mixer=AttentionConfig(num_heads=2))(inputs((10, 8))[0], timesteps, labels)
    assert build(mixer=replace(MIXER, factor=3), sample_size=(12, 24)).config.divisor == 12


def test_a_network_that_is_turned_on_its_side_sees_rows_and_columns_apart():
    network, (latents, timesteps, labels) = scrambled(build()), inputs((8, 24))
    square = build(mixer=replace(MIXER, position="rope2d_square")).double()
    square.load_state_dict(network.state_dict(), strict=True)
    assert error(square(latents, timesteps, labels), network(latents, timesteps, labels)) > 1e-3
    latents, timesteps, labels = inputs((16, 16))
    assert torch.equal(square(latents, timesteps, labels), network(latents, timesteps, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 7}, "hidden_size 7 must be even"),
        ({"depth": (0, 0, 0, 0, 0)}, "depth [0, 0, 0, 0, 0] five numbers of blocks, not all 0"),
        ({"depth": (1, 1, -1, 1, 1)}, "depth [1, 1, -1, 1, 1]"),
        ({"sample_size": (16, 12)}, "latents of 16x12 cannot be halved as often as this network does"),
        ({"mlp_ratio": 0.1}, "mlp_ratio 0.1 leaves no channels inside the MLP"),
        ({"mlp": "reparametrized"}, "unknown mlp 'reparametrized'; did you mean 'reparameterized'?"),
        ({"conditioning": "adaln-zero"}, "unknown conditioning 'adaln-zero'; did you mean 'adaln_zero'?"),
        ({"conditioning": "in_context"}, "conditioning 'in_context': a U-DiT halves its plane"),
        ({"conditioning": "cross_attention"}, "choose from adaln_zero, adaln"),
        ({"mixer": AttentionConfig(num_heads=3)}, "hidden_size 8 cannot be split into 3 heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError) as caught:
        build(**change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_number_of_stages_is_refused_when_it_is_read():
    data = to_dict(UDiTConfig(**SMALL))
    assert from_dict(BackboneConfig, data) == UDiTConfig(**SMALL)
    with pytest.raises(ConfigError, match=r"config\.depth: expected 5 values, got 3"):
        from_dict(BackboneConfig, data | {"depth": [1, 1, 1]})
