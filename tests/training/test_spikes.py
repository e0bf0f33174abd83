"""Spikes of the gradient in the loop itself: a run that met one is the run that never had its batch, bit for bit."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import array_images, scramble, tiny_config

from smalti.checkpoints import CheckpointStore
from smalti.data import SampleOrder
from smalti.data.examples import PixelExamples
from smalti.diffusion.levels import build_schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import NumericError
from smalti.presets import create_model
from smalti.training import EMA, TrainState, loop, train_steps
from smalti.training.batches import BatchSource
from smalti.training.config import GuardConfig
from smalti.training.guard import Guard
from smalti.training.optim import build_optimizer

BATCH, STEPS, SPIKE = 4, 30, 24
SKIP = GuardConfig(spike_factor=10.0)
REWIND = replace(SKIP, on_spike="rewind")

pytestmark = pytest.mark.faults


@pytest.fixture
def setting(tmp_path):
    """(config, batches, function that makes the state of step 0 with a guard)."""
    config = tiny_config(tmp_path, tmp_path, steps=STEPS, batch_size=BATCH, ema_decay=0.9)
    images = array_images(np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 9)
    batches = BatchSource(
        examples=PixelExamples(images),
        order=SampleOrder(range(40), 0),
        schedule=build_schedule("linear", 1000),
        objective=ObjectiveConfig(prediction="v"),
        null_class=9,
        flip=False,
        seed=0,
    )
    network = create_model("dit-emoji32", depth=1, hidden_size=16, num_heads=2, sample_size=8, patch_size=2)
    scramble(network)

    def new_state(guard):
        model = copy.deepcopy(network)
        return TrainState(model, EMA(model, 0.9), build_optimizer(model, config.optimizer), guard=guard)

    return config, batches, new_state


@pytest.fixture
def spiked(monkeypatch):
    """The losses of the batches of given steps, counted from 0, become 1e4 times what they are."""

    def spike(batches, steps):
        factor, real = {}, loop.training_losses
        for step in range(STEPS):
            eps = batches.at(step * BATCH, BATCH).eps
            factor[eps.sum().item()] = 1e4 if step in steps else 1.0

        def losses(*args, eps, **kwargs):
            result = real(*args, eps=eps, **kwargs)
            return result._replace(loss=result.loss * factor[eps.sum().item()])

        monkeypatch.setattr(loop, "training_losses", losses)

    return spike


def run_on(state, batches, config, steps=STEPS):
    return {report.step - 1: report for report in train_steps(state, batches, replace(config, steps=steps))}


def bits(state):
    members = {f"{group}.{name}": t for group, part in state.groups().items() for name, t in part.items()}
    return {name: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in members.items()}


def without(new_state, batches, config, left_out):
    """(losses, bits) of a run that never had the batches of these steps: the counters were moved by hand."""
    state, losses = new_state(Guard(GuardConfig())), {}
    for step in range(STEPS):
        if step in left_out:
            state.step += 1
            state.guard.restore({"skipped": [*state.skipped, step]})
            continue
        (report,) = train_steps(state, batches, replace(config, steps=step + 1))
        losses[step] = report.loss
    return losses, bits(state)


def losses_of(reports):
    return {step: report.loss for step, report in reports.items() if not report.skipped}


def test_after_a_spike_was_skipped_losses_and_weights_are_those_of_a_run_without_that_batch(setting, spiked):
    config, batches, new_state = setting
    spiked(batches, {SPIKE})
    clean, bits_without = without(new_state, batches, config, {SPIKE})
    state = new_state(Guard(SKIP))
    reports = run_on(state, batches, config)
    assert [step for step, report in reports.items() if report.skipped] == [SPIKE]
    assert reports[SPIKE].grad_norm > 1000 * reports[SPIKE - 1].grad_norm
    assert not reports[SPIKE].rewind
    assert losses_of(reports) == clean
    assert len(clean) == STEPS - 1
    assert bits(state) == bits_without
    unguarded = new_state(Guard(GuardConfig()))
    run_on(unguarded, batches, config)
    assert bits(unguarded) != bits_without  # or the spike did no harm, and its absence no good


@pytest.mark.parametrize("killed_after", [None, 1, 3])
def test_after_a_rewind_the_run_is_that_without_the_batch_also_when_the_replay_is_killed(
    setting, spiked, tmp_path, killed_after
):
    config, batches, new_state = setting
    spiked(batches, {SPIKE})
    clean, bits_without = without(new_state, batches, config, {SPIKE})
    store = CheckpointStore(tmp_path / "checkpoints")
    state = new_state(Guard(REWIND, tmp_path))
    seen = run_on(state, batches, config, 21)
    store.save(state.step, state.groups(), state.counters())
    reports = run_on(state, batches, config)
    assert list(reports) == [21, 22, 23, SPIKE]  # no step follows the one to go back from
    assert reports[SPIKE].rewind
    assert state.guard.rewinds == (SPIKE,)
    state.restore(store.load_newest(pytest.fail))
    if killed_after is not None:
        run_on(state, batches, config, state.step + killed_after)
        state = new_state(Guard(REWIND, tmp_path))  # another process, which knows what lies in the folder
        state.restore(store.load_newest(pytest.fail))
    assert state.step == 21
    again = run_on(state, batches, config)
    assert list(again) == list(range(21, STEPS))
    assert [step for step, report in again.items() if report.skipped] == [SPIKE]
    assert losses_of(seen | again) == clean
    assert bits(state) == bits_without
    assert state.skipped == (SPIKE,)


def test_a_run_resumed_between_two_spikes_decides_and_ends_as_one_that_was_never_stopped(setting, spiked, tmp_path):
    config, batches, new_state = setting
    spiked(batches, {22, 26})
    whole = new_state(Guard(SKIP))
    expected = run_on(whole, batches, config)
    assert whole.skipped == (22, 26)
    for stop in (10, 20, 24):
        store = CheckpointStore(tmp_path / str(stop))
        first = new_state(Guard(SKIP))
        reports = run_on(first, batches, config, stop)
        store.save(first.step, first.groups(), first.counters())
        second = new_state(Guard(SKIP))
        second.restore(store.load_newest(pytest.fail))
        reports |= run_on(second, batches, config)
        assert losses_of(reports) == losses_of(expected)
        assert second.counters() == whole.counters()
        assert bits(second) == bits(whole)


def test_a_run_of_spikes_ends_with_the_weights_before_them_and_what_is_known_of_them(setting, spiked, tmp_path):
    config, batches, new_state = setting
    spiked(batches, set(range(22, STEPS)))
    state = new_state(Guard(replace(SKIP, skip_budget=3), tmp_path))
    run_on(state, batches, config, 22)
    before = bits(state)
    with pytest.raises(NumericError, match=r"4 of the last 1000 .* \(steps 22, 23, 24, 25\)"):
        run_on(state, batches, config)
    assert bits(state) == before
    told = json.loads((tmp_path / "numeric-error-0000000025.json").read_text())["skipped"]
    batch = config.batch_size
    assert [one["positions"] for one in told] == [[step * batch, (step + 1) * batch] for step in range(22, 26)]


def test_a_step_that_is_passed_over_costs_nothing_and_changes_nothing(setting, monkeypatch):
    config, batches, new_state = setting
    guard = Guard(REWIND)
    guard.adopt([3])
    state = new_state(guard)
    run_on(state, batches, config, 3)
    before = bits(state)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_losses", lambda *args, **kwargs: pytest.fail("the batch was computed"))
        (report,) = run_on(state, batches, config, 4).values()
    assert (report.step, report.skipped, math.isnan(report.loss)) == (4, True, True)
    assert bits(state) == before
