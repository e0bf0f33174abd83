"""The door of mixers: `(x, grid) -> x`, and any mixer fits any stack."""

import pytest
import torch

from smalti.config import from_dict, to_dict
from smalti.errors import ConfigError
from smalti.models import DiT, DiTConfig
from smalti.nn.layers import Grid
from smalti.nn.mixers import (
    MIXERS,
    Attention,
    AttentionConfig,
    BiSSMConfig,
    BiWKVConfig,
    DownsampledAttentionConfig,
    MixerConfig,
    build_mixer,
)

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

# One small config per mixer: a new mixer adds its line here and gets every test below.
CONFIGS = {
    "attention": AttentionConfig(num_heads=4),
    "bi_ssm": BiSSMConfig(state_size=8),
    "bi_wkv": BiWKVConfig(),
    "downsampled_attention": DownsampledAttentionConfig(num_heads=4),
}
WIDTH = 32
KINDS = pytest.mark.parametrize("kind", MIXERS)


def build(kind):
    return build_mixer(CONFIGS[kind], WIDTH)


def test_every_mixer_of_the_table_is_tested():
    assert set(CONFIGS) == set(MIXERS)
    assert all(MIXERS[kind][0].kind == kind for kind in MIXERS)


@KINDS
@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(2, 6), Grid(8, 1)])
def test_tokens_keep_their_shape_on_any_grid(kind, grid):
    x = torch.randn(2, grid.tokens, WIDTH)
    if kind == "downsampled_attention" and grid.columns % 2:
        with pytest.raises(ValueError, match="both must be divisible by the factor 2"):
            build(kind)(x, grid)
        return
    y = build(kind)(x, grid)
    assert y.shape == x.shape
    assert y.isfinite().all()


@KINDS
def test_gradients_reach_every_weight_and_the_tokens(kind):
    mixer = build(kind)
    x = torch.randn(2, 16, WIDTH, requires_grad=True)
    mixer(x, Grid(4, 4)).square().sum().backward()
    assert (x.grad != 0).any()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


@KINDS
def test_every_token_sees_every_other(kind):
    mixer, x = build(kind).double(), torch.randn(1, 16, WIDTH, dtype=torch.float64, requires_grad=True)
    output = mixer(x, Grid(4, 4))
    for token in (0, 7, 15):
        (gradient,) = torch.autograd.grad(output[0, token].sum(), x, retain_graph=True)
        assert (gradient[0] != 0).any(dim=1).all(), token


@KINDS
def test_images_of_a_batch_do_not_see_each_other(kind):
    mixer, x = build(kind).double(), torch.randn(3, 16, WIDTH, dtype=torch.float64)
    changed = torch.cat([x[:2], torch.randn_like(x[2:])])
    torch.testing.assert_close(mixer(changed, Grid(4, 4))[:2], mixer(x, Grid(4, 4))[:2])
    torch.testing.assert_close(mixer(x[1:2], Grid(4, 4)), mixer(x, Grid(4, 4))[1:2])


@KINDS
def test_train_and_eval_are_the_same_function(kind):
    mixer, x = build(kind), torch.randn(2, 16, WIDTH)
    with torch.no_grad():
        assert torch.equal(mixer.train()(x, Grid(4, 4)), mixer.eval()(x, Grid(4, 4)))


@KINDS
def test_a_mixer_fits_into_dit(kind):
    config = DiTConfig(hidden_size=WIDTH, depth=1, mixer=CONFIGS[kind], sample_size=(8, 8), num_classes=3)
    network = DiT(config)
    output = network(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3]))
    assert output.shape == (2, 8, 8, 8)
    assert from_dict(DiTConfig, to_dict(config)) == config


@KINDS
def test_a_config_goes_through_data_and_back(kind):
    data = to_dict(CONFIGS[kind])
    assert data["kind"] == kind
    assert from_dict(MixerConfig, data) == CONFIGS[kind]


def test_an_unknown_mixer_is_answered_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"mixer: unknown kind 'atention'; did you mean 'attention'\?"):
        from_dict(MixerConfig, {"kind": "atention", "num_heads": 4}, "mixer")


@pytest.mark.parametrize("heads", [0, -4, 5])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    with pytest.raises(ConfigError, match=f"hidden_size 32 cannot be split into {heads} heads: choose a divisor of it"):
        Attention(AttentionConfig(num_heads=heads), WIDTH)


def test_attention_packs_queries_keys_values_in_this_order():
    mixer, x = Attention(AttentionConfig(num_heads=2), 8).double(), torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = (part.view(1, 5, 2, 4).transpose(1, 2) for part in mixer.qkv(x).split(8, dim=-1))
    expected = mixer.out(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(1, 5, 8))
    torch.testing.assert_close(mixer(x, Grid(1, 5)), expected)
