"""Patches, positions, timesteps, norms, heads: their laws, and their numbers at the start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smalti.errors import ConfigError
from smalti.nn.conditioning import (
    AdaLN,
    Conditioning,
    CrossAttention,
    Modulation,
    NoContext,
    NoModulation,
    PrependContext,
    add_branch,
    build_head_modulation,
    build_modulation,
)
from smalti.nn.embeddings import PatchEmbed, TimestepEmbedding, patchify, sincos_2d, timestep_sinusoid
from smalti.nn.layers import MLP, Grid, Head, Norm, linear, unpatchify, zero_init

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")


@pytest.mark.parametrize(("rows", "columns", "patch_size"), [(2, 3, 1), (3, 2, 2), (1, 4, 3), (2, 2, 4)])
def test_patchify_is_undone_by_unpatchify_for_every_grid(rows, columns, patch_size):
    image = torch.randn(2, 5, rows * patch_size, columns * patch_size)
    tokens = patchify(image, patch_size)
    assert tokens.shape == (2, rows * columns, 5 * patch_size**2)
    by_channel_last = tokens.unflatten(-1, (5, patch_size, patch_size)).movedim(2, -1).flatten(2)
    assert torch.equal(unpatchify(by_channel_last, Grid(rows, columns), patch_size), image)


def test_patchify_takes_memory_in_any_layout():
    image = torch.randn(2, 3, 4, 8)
    assert torch.equal(patchify(image.to(memory_format=torch.channels_last), 2), patchify(image, 2))
    assert torch.equal(patchify(image.transpose(2, 3), 2), patchify(image.transpose(2, 3).contiguous(), 2))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_patch_embedding_is_the_convolution_it_stands_for_with_all_gradients(patch_size):
    embed = PatchEmbed(3, 16, patch_size).double()
    ours = torch.randn(2, 3, 8, 4, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    tokens, expected = embed(ours), embed.proj(theirs).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected)
    above = torch.randn_like(tokens)
    parameters = list(embed.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(tokens, [ours, *parameters], above),
        torch.autograd.grad(expected, [theirs, *parameters], above),
    )


def test_positions_change_with_the_column_in_the_first_half_and_with_the_row_in_the_second():
    table = sincos_2d(3, 5, 16).view(3, 5, 16)
    assert (table[:, :, :8] == table[:1, :, :8]).all()
    assert (table[:, :, 8:] == table[:, :1, 8:]).all()
    assert torch.equal(table[0, 3, :8], table[3 % 3, 3, :8])
    assert table.flatten(0, 1).unique(dim=0).shape[0] == 15


def test_one_position_worked_out_by_hand():
    # D = 8: omega = (1, 1/100); row 2, column 1: [sin x, sin x/100, cos x, cos x/100 | the same of the row].
    expected = [f(a) for i in (1, 2) for f in (math.sin, math.cos) for a in (i, i / 100)]
    torch.testing.assert_close(sincos_2d(3, 4, 8)[2 * 4 + 1], torch.tensor(expected, dtype=torch.float64))


def test_positions_of_a_small_grid_are_those_of_the_corner_of_a_large_one():
    large = sincos_2d(6, 7, 12).view(6, 7, 12)
    assert torch.equal(sincos_2d(3, 4, 12).view(3, 4, 12), large[:3, :4])


@pytest.mark.parametrize("width", [2, 6, 13])
def test_positions_of_a_width_that_four_does_not_divide_are_refused(width):
    with pytest.raises(ValueError, match=f"hidden_size {width} is not divisible by 4"):
        sincos_2d(2, 2, width)


def test_a_timestep_of_zero_is_all_cosines():
    assert timestep_sinusoid(torch.zeros(1), 6).tolist() == [[1, 1, 1, 0, 0, 0]]


def test_one_timestep_worked_out_by_hand():
    # Half of 4: frequencies 1 and 10000^(-1/2) = 1/100.
    expected = torch.tensor([[math.cos(50), math.cos(0.5), math.sin(50), math.sin(0.5), 0]])
    torch.testing.assert_close(timestep_sinusoid(torch.tensor([50]), 5), expected)


def test_fractional_timesteps_count():
    assert not torch.equal(timestep_sinusoid(torch.tensor([0.25]), 8), timestep_sinusoid(torch.tensor([0.0]), 8))


def test_timestep_weights_start_small_and_biases_at_zero():
    embedding = TimestepEmbedding(512)
    for layer in (embedding.fc1, embedding.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert layer.bias.abs().max() == 0


def test_linear_layers_start_xavier_uniform_with_zero_bias():
    layer = linear(300, 500)
    bound = math.sqrt(6 / 800)
    assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert layer.bias.abs().max() == 0
    zeroed = zero_init(linear(3, 4))
    assert zeroed.weight.abs().max() == zeroed.bias.abs().max() == 0


def test_the_patch_weight_starts_xavier_uniform_as_a_matrix():
    embed = PatchEmbed(4, 256, 4)
    assert embed.proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 256)), rel=1e-3)


def test_the_norm_has_the_papers_epsilon_and_no_weights():
    assert list(Norm(8).parameters()) == []
    assert len(list(Norm(8, affine=True).parameters())) == 2
    # Channels +-1e-3 have variance 1e-6, equal to epsilon: the norm shrinks them by sqrt(2).
    x = 1e-3 * torch.tensor([[[1.0, -1, 1, -1, 1, -1, 1, -1]]])
    torch.testing.assert_close(Norm(8)(x), 1e3 * x / math.sqrt(2))


def test_the_mlp_is_two_layers_around_a_tanh_gelu():
    mlp = MLP(8, 2.5).double()
    assert mlp.fc1.weight.shape == (20, 8)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")))


@pytest.mark.parametrize("affine", [False, True])
def test_a_modulated_norm_shifts_and_scales_behind_what_it_does_alone(affine):
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    norm = Norm(4, affine=affine, eps=1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    alone = nn.LayerNorm(4, eps=1e-5, elementwise_affine=affine)
    alone.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), alone(x))
    # The weight is folded into the scale less 1, so rounding is that of numbers around 1.
    torch.testing.assert_close(norm(x, Modulation(shift, scale, None)), alone(x) * (1 + scale) + shift)


def test_a_branch_is_added_through_its_gate():
    x, branch, gate = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    torch.testing.assert_close(add_branch(x, branch, Modulation(gate, gate, gate)), x + gate * branch)
    assert torch.equal(add_branch(x, branch, Modulation(gate, gate, None)), x + branch)
    assert torch.equal(add_branch(x, branch, None), x + branch)


def test_adaln_hands_out_shift_scale_gate_for_each_branch_in_this_order():
    adaln = AdaLN(3, branches=2, gated=True, zero=True)
    with torch.no_grad():
        adaln.linear.bias.copy_(torch.arange(18.0))
    first, second = adaln(torch.zeros(1, 3))
    parts = [*first, *second]
    assert [part.flatten().tolist() for part in parts] == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(6)]
    assert all(part.shape == (1, 1, 3) for part in parts)


def test_adaln_without_gates_has_two_thirds_of_the_weights():
    with_gates = AdaLN(6, branches=2, gated=True, zero=True)
    without = AdaLN(6, branches=2, gated=False, zero=False)
    assert with_gates.linear.weight.shape == (36, 6)
    assert without.linear.weight.shape == (24, 6)
    assert all(m.gate is None for m in without(torch.randn(1, 6)))


def test_adaln_looks_at_silu_of_the_condition():
    adaln = AdaLN(4, branches=1, gated=False, zero=False)
    cond = torch.randn(2, 4)
    (m,) = adaln(cond)
    expected = F.linear(cond * torch.sigmoid(cond), adaln.linear.weight)
    torch.testing.assert_close(torch.cat([m.shift, m.scale], dim=-1)[:, 0], expected)


@pytest.mark.parametrize(
    ("kind", "block", "head", "zero"),
    [
        ("adaln_zero", 3, 2, True),
        ("adaln", 2, 2, False),
        ("cross_attention", None, None, None),
        ("in_context", None, None, None),
    ],
)
def test_each_conditioning_gets_its_modulation(kind, block, head, zero):
    modulation, last = build_modulation(kind, 8, branches=2), build_head_modulation(kind, 8)
    if block is None:
        assert isinstance(modulation, NoModulation)
        assert isinstance(last, NoModulation)
        assert modulation(torch.zeros(1, 8)) == (None, None)
        assert last(torch.zeros(1, 8)) == (None,)
        return
    assert (modulation.parts, last.parts) == (block, head)
    assert bool((modulation.linear.weight == 0).all()) is zero
    assert bool((last.linear.weight == 0).all()) is zero


def test_cross_attention_is_a_residual_branch_over_the_context():
    layer = CrossAttention(8, 2).double()
    x, context = torch.randn(2, 5, 8).double(), torch.randn(2, 3, 8).double()
    q = layer.query(layer.norm(x)).view(2, 5, 2, 4).transpose(1, 2)
    k, v = (part(context).view(2, 3, 2, 4).transpose(1, 2) for part in (layer.key, layer.value))
    weights = (q @ k.transpose(2, 3) / 2).softmax(dim=-1)
    expected = x + layer.out((weights @ v).transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(layer(x, context), expected)


def test_cross_attention_does_not_care_for_the_order_of_the_context():
    layer = CrossAttention(8, 2).double()
    x, context = torch.randn(1, 5, 8).double(), torch.randn(1, 3, 8).double()
    torch.testing.assert_close(layer(x, context), layer(x, context.flip(1)))


@pytest.mark.parametrize("heads", [0, 3, -1])
def test_cross_attention_heads_that_do_not_divide_are_refused(heads):
    with pytest.raises(ConfigError, match=f"hidden_size 8 cannot be split into {heads} heads of cross-attention"):
        CrossAttention(8, heads)


def test_context_joins_behind_the_image_tokens_or_not_at_all():
    x, context = torch.randn(2, 4, 8), torch.randn(2, 2, 8)
    assert torch.equal(PrependContext()(x, context), torch.cat([context, x], dim=1))
    assert NoContext()(x, context) is x


def test_conditions_are_one_vector_for_time_and_one_for_the_class():
    conditioning = Conditioning(8, 5)
    timesteps, labels = torch.tensor([0.0, 10.0]), torch.tensor([4, 5])
    context = conditioning(timesteps, labels)
    assert torch.equal(context[:, 0], conditioning.timestep(timesteps))
    assert torch.equal(context[:, 1], conditioning.label.weight[4:6])


def test_the_label_table_has_a_null_row_only_where_asked():
    assert Conditioning(512, 7).label.weight.shape == (8, 512)
    assert Conditioning(512, 7, null_class=False).label.weight.shape == (7, 512)
    assert Conditioning(512, 0).label is None
    assert Conditioning(512, 100).label.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (5, None, "this network has 5 classes: class_labels is missing"),
        (0, torch.tensor([1, 2]), "this network has no classes: call it with class_labels=None"),
        (5, torch.tensor([1]), r"class_labels of shape \(1,\): expected one per timestep, 2 in all"),
        (5, torch.tensor([[1], [2]]), r"class_labels of shape \(2, 1\): expected one per timestep, 2 in all"),
    ],
)
def test_labels_that_do_not_fit_are_refused(no_shape_checks, classes, labels, message):
    with pytest.raises(ValueError, match=message):
        Conditioning(8, classes)(torch.zeros(2), labels)


def test_the_head_lays_out_what_its_linear_layer_says():
    head = Head(8, 2, 3, NoModulation(1))
    assert isinstance(head.norm, Norm)
    assert head.norm.weight is not None
    assert head.out.weight.abs().max() == head.out.bias.abs().max() == 0
    with torch.no_grad():
        head.out.bias.copy_(torch.arange(12.0))
    image = head(torch.randn(1, 6, 8), torch.zeros(1, 8), Grid(2, 3))
    assert image.shape == (1, 3, 4, 6)
    # Inside a token: (row, column, channel), so channel c of pixel (i, j) is 6 i + 3 j + c.
    for c in range(3):
        assert image[0, c, :2, :2].tolist() == [[c, 3 + c], [6 + c, 9 + c]]
        assert torch.equal(image[0, c, 2:, 4:], image[0, c, :2, :2])


def test_the_head_has_no_affine_norm_where_the_condition_modulates_it():
    assert Head(8, 2, 3, AdaLN(8, 1, gated=False, zero=True)).norm.weight is None


def test_a_grid_counts_its_tokens():
    assert Grid(3, 4).tokens == 12
    assert tuple(Grid(rows=3, columns=4)) == (3, 4)
