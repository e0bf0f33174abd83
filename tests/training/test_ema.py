import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from smalti.training import EMA, default_decay

PARITY = Path(__file__).parents[1] / "data" / "parity"
INDEX = json.loads((PARITY / "index_training.json").read_text())["files"]["ema.safetensors"]
DECAYS = INDEX["hyperparams"]["decays"]
STEPS = range(1, INDEX["hyperparams"]["steps"] + 1)
AVERAGED = ("lin.weight", "lin.bias", "bn.weight", "bn.bias", "pos")
COPIED = ("buf", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
LATE = 10**9  # an update by which the warm-up is long over


class Small(nn.Module):
    """The module of the golden file."""

    def __init__(self, *, fixed_pos):
        super().__init__()
        self.lin, self.bn = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.pos = nn.Parameter(torch.zeros(2, 3), requires_grad=not fixed_pos)
        self.register_buffer("buf", torch.zeros(2))

    def put(self, state):
        self.load_state_dict({k: v.to(self.state_dict()[k].dtype) for k, v in state.items()})
        return self


def part(prefix):
    tensors = load_file(PARITY / "ema.safetensors")
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def averages(decay, *, fixed_pos):
    """(ours, the released one, the model) after each update, as state dicts."""
    model = Small(fixed_pos=fixed_pos).put(part(f"decay{decay}.input.ema0."))
    ema = EMA(model, decay)
    for n in STEPS:
        model.put(part(f"decay{decay}.input.model_step{n}."))
        ema.update(model, LATE + n)
        yield ema.model.state_dict(), part(f"decay{decay}.output.ema_step{n}."), model.state_dict()


def close(ours, released):
    """Within the index's tolerance for values up to 1, and its share of larger ones: `lerp` rounds once more."""
    return (ours - released).abs().max().item() <= INDEX["suggested_tolerance"]["abs"] * max(
        1.0, 3 * released.abs().max().item()
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_trainable_weights_follow_the_released_update(decay):
    for ours, released, _ in averages(decay, fixed_pos=False):
        for name in AVERAGED:
            assert close(ours[name], released[name]), name


@pytest.mark.parametrize("decay", DECAYS)
def test_what_is_not_trained_is_copied_where_the_released_update_averages_it_or_leaves_it_alone(decay):
    """Equal in use: the released position table never changes, and the released networks have no buffers."""
    differs = False
    for ours, released, model in averages(decay, fixed_pos=True):
        for name in ("pos", *COPIED):
            assert torch.equal(ours[name], model[name]), name
            differs |= not torch.allclose(ours[name].to(released[name].dtype), released[name])
        for name in AVERAGED[:-1]:
            assert close(ours[name], released[name]), name
    assert differs


def line(start):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, start)
    return model


def share_of_start(decay, updates, *, warm_up):
    """What is left of the initial weights: they are 1, and every weight after them is 0."""
    model = line(1.0).double()
    ema = EMA(model, decay)
    nn.init.zeros_(model.weight)
    for n in range(updates):
        ema.update(model, n if warm_up else LATE)
    return ema.model.weight.item()


def test_0_9999_from_the_first_step_keeps_82_percent_of_the_initial_weights_over_2000_steps():
    assert "82 %" in default_decay.__doc__
    assert share_of_start(0.9999, 2000, warm_up=False) == pytest.approx(0.9999**2000)
    assert round(0.9999**2000, 2) == 0.82


@pytest.mark.parametrize("decay", [0.9999, 0.99])
def test_the_warm_up_leaves_no_trace_of_the_initial_weights(decay):
    """Product of (1 + n) / (10 + n) over the updates: 1 / binomial(109, 9) after 100."""
    assert "1e-9 after 100" in EMA.__doc__
    left = share_of_start(decay, 100, warm_up=True)
    assert left < 1e-9
    if decay == 0.9999:
        assert left == pytest.approx(1 / math.comb(109, 9))


def test_the_first_updates_use_the_warm_up_and_later_ones_the_decay():
    for update, used in ((0, 0.1), (1, 2 / 11), (8, 0.5), (10**6, 0.9)):
        ema = EMA(line(1.0), 0.9)
        ema.update(line(0.0), update)
        assert ema.model.weight.item() == pytest.approx(used)


@pytest.mark.parametrize(
    ("steps", "decay"), [(1, 0.0), (25, 0.0), (100, 0.75), (1000, 0.975), (2000, 0.9875), (250_000, 0.9999)]
)
def test_the_default_looks_back_over_4_percent_of_the_run(steps, decay):
    assert default_decay(steps) == pytest.approx(decay)
    assert default_decay(10 * 250_000) == 0.9999


def test_the_average_is_a_copy_that_does_not_train_and_does_not_share_memory():
    model = line(1.0)
    ema = EMA(model, 0.9)
    nn.init.zeros_(model.weight)
    assert ema.model.weight.item() == 1
    assert not ema.model.training
    assert not ema.model.weight.requires_grad
