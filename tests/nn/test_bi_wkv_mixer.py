"""The Bi-WKV mixer: its equations once more, its initial values, and tokens that stand in front of the image."""

import math

import pytest
import torch

from smalti.config import from_dict
from smalti.errors import ConfigError
from smalti.nn.layers import Grid
from smalti.nn.mixers import BiWKVConfig, MixerConfig, Place, build_mixer
from smalti.nn.mixers.bi_wkv import initial_shares
from smalti.ops import bi_wkv, bi_wkv_release

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

WIDTH = 8


def build(place=Place(1, 3), **settings):  # noqa: B008  (a tuple of numbers)
    mixer = build_mixer(BiWKVConfig(**settings), WIDTH, place).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_()
    return mixer


def by_the_paper(mixer, x, grid, front=0, divide_bonus=True):
    """Token by token, with sums written out; no code in common."""
    s = {k: v.detach() for k, v in mixer.state_dict().items()}
    shifted, quarter = torch.zeros_like(x), WIDTH // 4
    shifted[:, :front] = x[:, :front]
    for row in range(grid.rows):
        for column in range(grid.columns):
            here = front + row * grid.columns + column
            for group, (r, c) in enumerate(
                ((row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column))
            ):
                if 0 <= r < grid.rows and 0 <= c < grid.columns:
                    channels = slice(group * quarter, (group + 1) * quarter)
                    shifted[:, here, channels] = x[:, front + r * grid.columns + c, channels]
    mixed = {
        n: x * s[f"neighbours.shares.{n}"] + shifted * (1 - s[f"neighbours.shares.{n}"])
        for n in ("key", "value", "gate")
    }
    k, v, r = (mixed[n] @ s[f"{n}.weight"].T for n in ("key", "value", "gate"))
    n = x.shape[1]
    w, u = s["decay"] / n, s["bonus"] / (n if divide_bonus else 1)
    out = torch.empty_like(x)
    for t in range(n):
        weights = [torch.exp(k[:, i] + (u if i == t else -(abs(t - i) - 1) * w)) for i in range(n)]
        out[:, t] = sum(a * v[:, i] for i, a in enumerate(weights)) / sum(weights)
    return (torch.sigmoid(r) * out) @ s["out.weight"].T


@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(1, 5), Grid(4, 2), Grid(1, 1)])
@pytest.mark.parametrize("front", [0, 1, 2])
@pytest.mark.parametrize("divide_bonus", [True, False])
def test_the_mixer_computes_the_paper_s_equations(grid, front, divide_bonus):
    mixer = build(divide_bonus=divide_bonus)
    x = torch.randn(2, front + grid.tokens, WIDTH, dtype=torch.float64)
    expected = by_the_paper(mixer, x, grid, front, divide_bonus)
    torch.testing.assert_close(mixer(x, grid), expected, rtol=1e-9, atol=1e-9)


def test_release_is_another_arithmetic_on_the_same_weights():
    paper, x = build(), torch.randn(2, 12, WIDTH, dtype=torch.float64)
    release = build(wkv="release")
    release.load_state_dict(paper.state_dict())
    assert paper.op is bi_wkv
    assert release.op is bi_wkv_release
    difference = (paper(x, Grid(3, 4)) - release(x, Grid(3, 4))).abs().max()
    assert 1e-6 < difference / paper(x, Grid(3, 4)).abs().max() < 1


def test_a_norm_of_the_means_makes_their_scale_unimportant():
    mixer, x = build(key_norm=True), torch.randn(1, 6, WIDTH, dtype=torch.float64)
    assert sorted(n for n, _ in mixer.named_parameters() if "norm" in n) == ["norm.bias", "norm.weight"]
    before = mixer(x, Grid(2, 3))
    with torch.no_grad():
        mixer.value.weight *= 1e4
    after = mixer(x, Grid(2, 3))
    with torch.no_grad():
        mixer.value.weight *= 1e4
    torch.testing.assert_close(mixer(x, Grid(2, 3)), after, rtol=1e-6, atol=1e-6)  # the epsilon is out of sight by then
    assert (before - after).abs().max() > 0


def test_without_a_shift_there_are_no_shares_and_the_grid_does_not_matter():
    mixer, x = build(shift=0), torch.randn(1, 12, WIDTH, dtype=torch.float64)
    assert not any("shares" in name for name, _ in mixer.named_parameters())
    assert torch.equal(mixer(x, Grid(3, 4)), mixer(x, Grid(2, 6)))
    shifting = build()
    assert not torch.allclose(shifting(x, Grid(3, 4)), shifting(x, Grid(2, 6)))


def test_turning_the_image_by_half_turns_the_answer_when_the_shift_is_off():
    mixer, x = build(shift=0), torch.randn(1, 12, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(mixer(x.flip(1), Grid(3, 4)), mixer(x, Grid(3, 4)).flip(1))


def test_two_thousand_tokens_are_no_limit():
    mixer = build_mixer(BiWKVConfig(), WIDTH)
    y = mixer(torch.randn(1, 45 * 45, WIDTH), Grid(45, 45))
    assert y.isfinite().all()


def test_too_few_tokens_for_the_grid_are_refused():
    with pytest.raises(ValueError, match="5 tokens do not fill a grid of 2x3"):
        build()(torch.randn(1, 5, WIDTH, dtype=torch.float64), Grid(2, 3))


def test_half_precision_weights_keep_the_decay_wide_and_give_half_precision_back():
    mixer, x = build_mixer(BiWKVConfig(), WIDTH), torch.randn(2, 64, WIDTH)
    exact = mixer.double()(x.double(), Grid(8, 8))
    half = mixer.bfloat16()(x.bfloat16(), Grid(8, 8))
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() / exact.abs().max() < 16 * torch.finfo(torch.bfloat16).eps


# --- initial values


@pytest.mark.parametrize("place", [Place(0, 13), Place(6, 13), Place(12, 13), Place(0, 1)])
def test_initial_values_are_those_of_the_formulas(place):
    d = 12
    mixer = build_mixer(BiWKVConfig(), d, place)
    up = place.layer / (place.depth - 1) if place.depth > 1 else 0.0
    down = 1 - place.layer / place.depth
    for j in range(d):
        assert mixer.decay[j].item() == pytest.approx(-5 + 8 * (j / (d - 1)) ** (0.7 + 1.3 * up), rel=1e-6)
        assert mixer.bonus[j].item() == pytest.approx(math.log(0.3) + 0.5 * ((j + 1) % 3 - 1), rel=1e-6)
        share = {name: mixer.neighbours.shares[name][0, 0, j].item() for name in ("key", "value", "gate")}
        assert share["key"] == pytest.approx((j / d) ** down, rel=1e-6)
        assert share["value"] == pytest.approx((j / d) ** down + 0.3 * up, rel=1e-6)
        assert share["gate"] == pytest.approx((j / d) ** (0.5 * down), rel=1e-6)


@pytest.mark.parametrize(("init", "level", "share"), [("local", 1.0, 1.0), ("global", 0.0, 0.5)])
def test_the_two_flat_initial_values(init, level, share):
    mixer = build_mixer(BiWKVConfig(init=init), WIDTH, Place(2, 5))
    assert torch.equal(mixer.decay, torch.full((WIDTH,), level))
    assert torch.equal(mixer.bonus, torch.full((WIDTH,), level))
    for name in ("key", "value", "gate"):
        assert torch.equal(mixer.neighbours.shares[name], torch.full((1, 1, WIDTH), share))
    own = [p.data_ptr() for p in mixer.parameters()]
    assert len(set(own)) == len(own)


def test_products_start_xavier_uniform_and_have_no_bias():
    mixer = build_mixer(BiWKVConfig(), 256)
    bound = math.sqrt(6 / 512)
    for name in ("key", "value", "gate", "out"):
        layer = getattr(mixer, name)
        assert layer.bias is None
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # 65,536 values


def test_shares_are_made_in_double_and_kept_in_the_default_dtype():
    assert all(share.dtype == torch.float32 for share in initial_shares(6, Place(1, 3), "fancy").values())


# --- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shift": -1}, "shift -1 must be at least 0"),
        ({"shift_fraction": 0.3}, "the fraction 0.3 of each group in (0, 0.25]"),
        ({"shift_fraction": 0.0}, "the fraction 0.0"),
        ({"init": "fancier"}, "did you mean 'fancy'?"),
        ({"wkv": "released"}, "did you mean 'release'?"),
        ({"wvk": "paper"}, "did you mean 'wkv'?"),
    ],
)
def test_wrong_settings_are_config_errors_in_one_line(settings, said):
    with pytest.raises(ConfigError) as caught:
        from_dict(MixerConfig, {"kind": "bi_wkv"} | settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["wkv", "init"])
def test_a_config_made_in_python_is_checked_too(name):
    with pytest.raises(ConfigError, match=f"unknown {name} 'none of these'"):
        BiWKVConfig(**{name: "none of these"})
