"""The bidirectional state space as a mixer: directions, initial values, and a spectrum that is never stale."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from smalti.errors import ConfigError
from smalti.nn.layers import Grid
from smalti.nn.mixers import BiSSM, BiSSMConfig
from smalti.ops import force

pytestmark = pytest.mark.usefixtures("deterministic", "seeded")

GRID = Grid(4, 6)
D = 8
VARIANTS = [
    {},
    {"bidirectional": False},
    {"shared_dynamics": True},
    {"trained_input": False},
    {"directions": "concat"},
    {"output": "glu"},
    {"activation": "silu"},
    {"init": "inv"},
    {"init": "legs"},
    {"discretization": "bilinear"},
]


def build(dtype=torch.float64, **changes):
    return BiSSM(BiSSMConfig(**{"state_size": 8} | changes), D).to(dtype)


def tokens(batch=2, count=GRID.tokens, dtype=torch.float64):
    return torch.randn(batch, count, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


# --- what it computes


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_mixer_is_convolution_activation_and_mixing(changes):
    mixer, x = build(**changes), tokens()
    forward, backward = mixer.kernels(24)
    y = torch.zeros(2, 2 * D if changes.get("directions") == "concat" else D, 24, dtype=torch.float64)
    for n in range(24):
        for m in range(24):
            u = x[:, m] if y.shape[1] == D else torch.cat([x[:, m], x[:, m]], dim=1)
            y[..., n] += u * (forward[:, n - m] if n >= m else backward[:, m - n - 1])
    y[:, :D] += mixer.skip[:, None] * x.mT
    y = (nn.functional.silu if changes.get("activation") == "silu" else nn.functional.gelu)(y).mT
    y = y @ mixer.out.weight.mT + mixer.out.bias
    if changes.get("output") == "glu":
        y = y[..., :D] * y[..., D:].sigmoid()
    torch.testing.assert_close(mixer(x, GRID), y)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_gradients_reach_every_parameter_and_agree_with_the_reference(changes):
    mixer, x = build(**changes), tokens().requires_grad_()
    sources = [x, *mixer.parameters()]
    fast = torch.autograd.grad(mixer(x, GRID).square().sum(), sources)
    with force("reference"):
        plain = torch.autograd.grad(mixer(x, GRID).square().sum(), sources)
    for f, p in zip(fast, plain, strict=True):
        assert (f != 0).any()
        torch.testing.assert_close(f, p, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_one_direction_is_causal_and_two_are_not(bidirectional):
    mixer, x = build(bidirectional=bidirectional), tokens()
    changed = x.clone()
    changed[:, 10:] += 1
    same = torch.isclose(mixer(x, GRID)[:, :10], mixer(changed, GRID)[:, :10], rtol=1e-9, atol=1e-12).all()
    assert same != bidirectional


def test_the_grid_does_not_matter_and_tokens_in_front_are_part_of_the_sequence():
    mixer, x = build(), tokens(count=26)
    torch.testing.assert_close(mixer(x, GRID), mixer(x, Grid(26, 1)))


@pytest.mark.parametrize("changes", [{}, {"bidirectional": False}, {"shared_dynamics": True}])
def test_parameters_are_as_many_as_the_papers_say(changes):
    d, s = 1152, 32
    with torch.device("meta"):
        mixer = BiSSM(BiSSMConfig(**changes), d)
    directions = 1 if changes.get("bidirectional") is False else 2
    dynamics = 1 if changes else directions
    per_channel = dynamics * (1 + s + s + 2 * s) + directions * 2 * s  # dt, Re A, Im A, B; C
    assert sum(p.numel() for p in mixer.parameters()) == d * per_channel + d + d * d + d
    if not changes:
        assert per_channel == 2 * 193


# --- initial values


def test_frequencies_begin_where_the_paper_puts_them():
    n = torch.arange(4, dtype=torch.float64)
    lin, inv = build(init="lin"), build(init="inv")
    torch.testing.assert_close(lin.frequency.detach(), (math.pi * n).expand(2, D, 4), rtol=1e-6, atol=1e-6)
    expected = 8 / math.pi * (8 / (2 * n + 1) - 1)
    torch.testing.assert_close(inv.frequency.detach(), expected.expand(2, D, 4), rtol=1e-6, atol=1e-6)
    for mixer in (lin, inv, build(init="legs")):
        assert torch.allclose(mixer.log_decay, torch.tensor(math.log(0.5), dtype=torch.float64))
        assert ((mixer.log_dt >= math.log(1e-3) - 1e-6) & (mixer.log_dt <= math.log(1e-1) + 1e-6)).all()


def test_the_legs_state_space_draws_legendre_polynomials():
    """HiPPO-LegS: of x' = A x + B u with A = A_normal - P P^T; its normal part has these eigenvalues and this B."""
    size = 16
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    hippo = -(torch.tril(root[:, None] * root, -1) + torch.diag(n + 1))
    normal = hippo + root[:, None] * root / 2  # P = sqrt(n + 1/2)
    eigenvalues = torch.linalg.eigvals(normal)
    mixer = build(init="legs", state_size=size)
    half = eigenvalues[eigenvalues.imag > 0]
    torch.testing.assert_close(half.real, torch.full((size // 2,), -0.5, dtype=torch.float64))
    torch.testing.assert_close(mixer.frequency[0, 0].detach(), half.imag.sort().values, rtol=1e-6, atol=1e-6)
    # With C = B* the impulse response at time 0 is |B|^2, which no change of basis alters.
    b = mixer.input_vector[0, 0].detach()
    torch.testing.assert_close(2 * b.square().sum(), (2 * n + 1).sum(), rtol=1e-6, atol=1e-6)
    assert (b[:, 0] > 0).all()
    assert not b[:, 1].any()


def test_output_vectors_have_unit_variance_and_steps_are_spread_log_uniformly():
    mixer = BiSSM(BiSSMConfig(), 256)
    assert abs(mixer.output_vector.square().sum(-1).mean().item() - 1) < 0.05
    share = ((mixer.log_dt - math.log(1e-3)) / math.log(100)).flatten().detach()
    assert abs(share.mean() - 0.5) < 0.05
    assert abs(share.std() - 12**-0.5) < 0.03
    assert abs(mixer.skip.std() - 1) < 0.15


# --- the kept spectrum


def fresh(mixer, x):
    """The output without anything kept."""
    with torch.enable_grad():
        return mixer(x, GRID).detach()


def changes_of(mixer):
    """Ways in which parameters change under the feet of whoever keeps something."""
    with torch.no_grad():
        yield "in place", lambda: mixer.log_dt.add_(0.1)
        yield "through .data", lambda: mixer.output_vector.data.mul_(1.1)
        yield "as another tensor", lambda: setattr(mixer.frequency, "data", mixer.frequency.data + 0.5)
        yield "loaded", lambda: mixer.load_state_dict({k: v + 0.1 for k, v in mixer.state_dict().items()})
        yield (
            "assigned",
            lambda: mixer.load_state_dict({k: v * 1.1 for k, v in mixer.state_dict().items()}, assign=True),
        )
        yield "a new parameter", lambda: setattr(mixer, "log_decay", nn.Parameter(mixer.log_decay + 0.2))
        yield (
            "foreach",
            lambda: torch._foreach_lerp_(list(mixer.parameters()), [p * 0.9 for p in mixer.parameters()], 0.5),
        )
        yield "the skip alone", lambda: mixer.skip.data.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_kept_spectrum_follows_every_change_of_the_weights(dtype):
    mixer, x = build(dtype), tokens(dtype=dtype)
    for name, change in changes_of(mixer):
        with torch.no_grad():
            before = mixer(x, GRID)
            assert torch.equal(mixer(x, GRID), before)
            change()
            after = mixer(x, GRID)
        assert not torch.equal(before, after), name
        assert torch.equal(after, fresh(mixer, x)), name


def test_the_kept_spectrum_follows_optimizer_steps_and_moves():
    mixer, x = build(torch.float32), tokens(dtype=torch.float32)
    for fused in (True, False):
        optimizer = torch.optim.AdamW(mixer.parameters(), lr=1e-2, fused=fused)
        for _ in range(2):
            with torch.no_grad():
                mixer(x, GRID)
            mixer(x, GRID).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                assert torch.equal(mixer(x, GRID), fresh(mixer, x))
    with torch.inference_mode():
        mixer(x, GRID)
        mixer.log_dt.add_(0.3)
        found = mixer(x, GRID)
    assert torch.equal(found, fresh(mixer, x))
    mixer.double()
    assert mixer._kept is None
    with torch.no_grad():
        assert torch.equal(mixer(x.double(), GRID), fresh(mixer, x.double()))


def test_other_lengths_other_weights_and_other_implementations_get_their_own():
    mixer, x = build(torch.float32), tokens(dtype=torch.float32)
    with torch.no_grad():
        mixer(x, GRID)
        shorter = mixer(x[:, :10], Grid(1, 10))
        weights = {name: p + 0.1 for name, p in mixer.named_parameters()}
        swapped = functional_call(mixer, weights, (x, GRID))
        again = mixer(x, GRID)
        with force("reference"):
            plain = mixer(x, GRID)
    assert torch.equal(shorter, fresh(mixer, x[:, :10]))
    assert torch.equal(again, fresh(mixer, x))
    mixer.load_state_dict(weights)
    assert torch.equal(swapped, fresh(mixer, x))
    assert not torch.equal(plain, again)
    torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)


def test_it_is_kept_without_gradients_only_and_is_no_part_of_state_copies_or_pickles():
    mixer, x = build(torch.float32), tokens(dtype=torch.float32)
    mixer(x, GRID)
    assert mixer._kept is None
    names = set(mixer.state_dict())
    with torch.no_grad():
        mixer(x, GRID)
        kept = mixer._kept
        mixer(x, GRID)
    assert mixer._kept is kept is not None
    assert set(mixer.state_dict()) == names
    file = io.BytesIO()
    torch.save(mixer, file)
    file.seek(0)
    for other in (copy.deepcopy(mixer), torch.load(file, weights_only=False)):
        assert other._kept is None
        with torch.no_grad():
            other.log_dt.add_(0.2)
            assert torch.equal(other(x, GRID), fresh(other, x))
            assert torch.equal(mixer(x, GRID), fresh(mixer, x))
    mixer.forget()
    assert mixer._kept is None


def test_an_ensemble_of_weights_without_gradients_works():
    mixer, x = build(), tokens()
    stacked = {name: torch.stack([p.detach(), p.detach() * 1.1]) for name, p in mixer.named_parameters()}
    with torch.no_grad():
        both = torch.func.vmap(lambda weights: functional_call(mixer, weights, (x, GRID)))(stacked)
    for i in (0, 1):
        alone = functional_call(mixer, {name: s[i] for name, s in stacked.items()}, (x, GRID))
        torch.testing.assert_close(both[i], alone)


# --- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_size": 7}, "state_size 7: states come in conjugate pairs"),
        ({"state_size": 0}, "state_size 0"),
        ({"dt_range": (0.1, 0.01)}, "the smaller first"),
        ({"dt_range": (0.0, 0.01)}, "above 0"),
        ({"init": "linn"}, r"unknown init 'linn'; did you mean 'lin'\?"),
        ({"discretization": "euler"}, "unknown discretization 'euler'"),
        ({"bidirectional": False, "directions": "concat"}, "no meaning with bidirectional=False"),
        ({"init": "legs", "trained_input": False}, "B of its own"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        BiSSMConfig(**changes)
    assert "\n" not in str(caught.value)
