import copy
import json

import pytest
import torch
from tiny_runs import tiny_config

from smalti.checkpoints import CheckpointStore
from smalti.errors import CheckpointError
from smalti.presets import create_model
from smalti.training import EMA, TrainState
from smalti.training.optim import build_optimizer

SETTINGS = {"depth": 1, "hidden_size": 16, "num_heads": 2, "sample_size": 8}


def state_of(tmp_path, seed=0, **changes):
    torch.manual_seed(seed)
    model = create_model("dit-emoji32", **SETTINGS | changes)
    return TrainState(model, EMA(model, 0.5), build_optimizer(model, tiny_config(tmp_path, tmp_path).optimizer))


def trained(tmp_path, **changes):
    """A state whose optimizer and average hold something."""
    state = state_of(tmp_path, **changes)
    for n in range(3):
        loss = state.model(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 3])).square().mean()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.model, n)
    state.step = 7
    state.guard.restore({"skipped": [2, 5]})
    return state


def flat(state):
    return {f"{g}.{n}": t for g, group in state.groups().items() for n, t in group.items()}


@pytest.fixture(autouse=True)
def _seeded(seeded):
    pass


def test_everything_comes_back_from_a_checkpoint_bit_by_bit(tmp_path):
    state = trained(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(state.step, state.groups(), state.counters())
    other = state_of(tmp_path, seed=1)
    other.restore(store.load(7))
    assert (other.step, other.skipped) == (7, (2, 5))
    before, after = flat(state), flat(other)
    assert before.keys() == after.keys()
    assert sum(name.startswith("optimizer.") for name in before) == 3 * len(
        [p for p in state.model.parameters() if p.requires_grad]
    )
    for name in before:
        assert torch.equal(before[name], after[name]), name
        assert before[name].dtype == after[name].dtype, name


def test_a_restored_state_trains_on_exactly_as_the_one_that_was_stored(tmp_path):
    state = trained(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(state.step, state.groups(), state.counters())
    other = state_of(tmp_path, seed=1)
    other.restore(store.load(7))
    x = torch.randn(2, 3, 8, 8)
    for s in (state, other):
        s.model(x, torch.tensor([1.0, 500.0]), torch.tensor([0, 3])).square().mean().backward()
        s.optimizer.step()
        s.ema.update(s.model, 3)
    for name, tensor in flat(state).items():
        assert torch.equal(tensor, flat(other)[name]), name


def test_counters_are_json(tmp_path):
    state = trained(tmp_path)
    assert json.loads(json.dumps(state.counters())) == {"step": 7, **state.guard.counters()}
    assert state.counters()["skipped"] == [2, 5]


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"depth": 2}, {"num_classes": 4}, {"conditioning": "adaln"}])
def test_a_checkpoint_of_another_network_is_refused_in_one_line_and_harms_nothing_stored(tmp_path, changes):
    store = CheckpointStore(tmp_path / "checkpoints")
    state = trained(tmp_path, **changes)
    store.save(7, state.groups(), state.counters())
    with pytest.raises(CheckpointError, match="checkpoint of another model") as caught:
        state_of(tmp_path).restore(store.load(7))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("missing", ["model", "ema", "optimizer", "step"])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path, missing):
    state = trained(tmp_path)
    tensors, counters = state.groups(), state.counters()
    tensors.pop(missing, None)
    counters.pop(missing, None)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(7, tensors, counters)
    with pytest.raises(CheckpointError, match=missing):
        state_of(tmp_path).restore(store.load(7))


def test_optimizer_state_of_an_unknown_parameter_is_refused(tmp_path):
    state = trained(tmp_path)
    tensors = copy.copy(state.groups())
    tensors["optimizer"] = tensors["optimizer"] | {"nowhere.weight.exp_avg": torch.zeros(3)}
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(7, tensors, state.counters())
    with pytest.raises(CheckpointError, match=r"unknown parameter 'nowhere\.weight'"):
        state_of(tmp_path).restore(store.load(7))


def test_moments_of_another_shape_are_refused_and_not_stretched(tmp_path):
    state = trained(tmp_path)
    tensors = copy.copy(state.groups())
    name = next(name for name, tensor in tensors["optimizer"].items() if tensor.ndim == 2)
    tensors["optimizer"] = tensors["optimizer"] | {name: tensors["optimizer"][name][:1].clone()}
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(7, tensors, state.counters())
    with pytest.raises(CheckpointError, match=r"optimizer state .* the parameter"):
        state_of(tmp_path).restore(store.load(7))


@pytest.mark.parametrize("group", ["model", "ema"])
def test_weights_of_another_dtype_are_refused_and_not_rounded(tmp_path, group):
    state = trained(tmp_path)
    tensors = copy.copy(state.groups())
    tensors[group] = {name: tensor.bfloat16() for name, tensor in tensors[group].items()}
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(7, tensors, state.counters())
    with pytest.raises(CheckpointError, match=r"bfloat16 there, .* float32 here"):
        state_of(tmp_path).restore(store.load(7))


def test_of_a_checkpoint_before_the_first_step_nothing_is_left_of_later_moments(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    first = state_of(tmp_path)
    store.save(0, first.groups(), first.counters())
    state = trained(tmp_path)
    state.restore(store.load(0))
    assert not state.optimizer.state
    assert (state.step, state.skipped) == (0, ())
