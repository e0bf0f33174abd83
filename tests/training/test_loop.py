"""The loop: gradients that are sums over the batch, steps that are refused, one rate per step."""

import copy
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
from smalti.diffusion.objectives import ObjectiveConfig, training_losses
from smalti.errors import NumericError
from smalti.presets import create_model
from smalti.training import EMA, OptimizerConfig, TrainState, loop, train_steps
from smalti.training.batches import BatchSource
from smalti.training.optim import build_optimizer, learning_rate

BATCH = 8


@pytest.fixture
def setting(tmp_path):
    """(config, batches, function that makes the same state anew)."""
    config = tiny_config(tmp_path, tmp_path, steps=1, batch_size=BATCH, ema_decay=0.9)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    images = array_images(pixels, np.arange(40) % 9)
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

    def new_state(optimizer=config.optimizer):
        model = copy.deepcopy(network)
        return TrainState(model, EMA(model, 0.9), build_optimizer(model, optimizer))

    return config, batches, new_state


def one_step(state, batches, config):
    """(report, every gradient as the optimizer met it)."""
    met = {}

    def look(*_):
        met.update({n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None})

    handle = state.optimizer.register_step_pre_hook(look)
    (report,) = train_steps(state, batches, replace(config, steps=state.step + 1))
    handle.remove()
    return report, met


def exact_gradients(state, batches):
    """Of the mean loss over the whole batch, everything in float64."""
    model = copy.deepcopy(state.model).double()
    batch = batches.at(0, BATCH)
    losses = training_losses(
        model,
        batch.x0.double(),
        batch.class_labels,
        eps=batch.eps.double(),
        levels=batch.levels,
        config=batches.objective,
    )
    losses.loss.mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def norm_of(gradients):
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))


def distance(gradients, exact):
    assert gradients.keys() == exact.keys()
    return norm_of({n: gradients[n].double() - exact[n] for n in exact})


@pytest.mark.parametrize(("micro_batch", "parts"), [(8, 1), (4, 2), (2, 4), (3, 3), (5, 2), (1, 8)])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(setting, micro_batch, parts):
    """Gradients and not weights: AdamW would hide a constant factor.

    At most twice as wrong as the whole batch at once, against float64, and the rounding of one sum per part.
    """
    config, batches, new_state = setting
    exact = exact_gradients(new_state(), batches)
    size = norm_of(exact)
    assert size > 0.1
    _, whole = one_step(new_state(), batches, config)
    report, split = one_step(new_state(), batches, replace(config, micro_batch=micro_batch))
    allowed = 2 * distance(whole, exact) + (parts + 2) * torch.finfo(torch.float32).eps * size
    assert allowed < 1e-4 * size  # so that a part left out, or counted by its own size, cannot hide
    assert distance(split, exact) <= allowed
    assert abs(report.grad_norm - size) <= allowed


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_the_reported_loss_is_the_mean_over_the_batch(setting, micro_batch):
    config, batches, new_state = setting
    report, _ = one_step(new_state(), batches, replace(config, micro_batch=micro_batch))
    state, batch = new_state(), batches.at(0, BATCH)
    with torch.no_grad():
        losses = training_losses(
            state.model, batch.x0, batch.class_labels, eps=batch.eps, levels=batch.levels, config=batches.objective
        )
    assert report.loss == pytest.approx(losses.loss.double().mean().item(), rel=1e-5)


def test_the_second_step_starts_from_empty_gradients_and_new_samples(setting):
    config, batches, new_state = setting
    state = new_state()
    one_step(state, batches, config)
    assert all(p.grad is None or not p.grad.any() for p in state.model.parameters())
    _, second = one_step(state, batches, config)
    batch = batches.at(BATCH, BATCH)
    model = new_state().model
    model.load_state_dict(before_step(new_state, batches, config))
    training_losses(
        model, batch.x0, batch.class_labels, eps=batch.eps, levels=batch.levels, config=batches.objective
    ).loss.mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance(second, expected) <= 1e-5 * norm_of(expected)


def before_step(new_state, batches, config):
    state = new_state()
    one_step(state, batches, config)
    return state.model.state_dict()


def test_clipping_limits_the_norm_that_the_optimizer_meets_and_reports_the_one_before(setting):
    config, batches, new_state = setting
    free, plain = one_step(new_state(), batches, config)
    limit = norm_of(plain) / 3
    clipping = replace(config, optimizer=replace(config.optimizer, clip_norm=limit))
    clipped, met = one_step(new_state(), batches, clipping)
    assert clipped.grad_norm == free.grad_norm == pytest.approx(norm_of(plain), rel=1e-5)
    assert norm_of(met) == pytest.approx(limit, rel=1e-4)
    loose = replace(config, optimizer=replace(config.optimizer, clip_norm=norm_of(plain) * 3))
    _, met = one_step(new_state(), batches, loose)
    assert all(torch.equal(met[name], plain[name]) for name in plain)


def test_every_step_uses_its_own_learning_rate(setting):
    config, batches, new_state = setting
    schedule = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, decay="cosine")
    state, used = new_state(schedule), []
    spared = state.optimizer.param_groups[0]["params"].pop()  # as of a mixer whose parameters do not decay
    state.optimizer.add_param_group({"params": [spared], "weight_decay": 0.0})
    state.optimizer.register_step_pre_hook(lambda o, *_: used.append([g["lr"] for g in o.param_groups]))
    reports = list(train_steps(state, batches, replace(config, steps=6, optimizer=schedule)))
    expected = [learning_rate(schedule, step, 6) for step in range(6)]
    assert [r.learning_rate for r in reports] == expected
    assert used == [[rate, rate] for rate in expected]
    assert [r.step for r in reports] == [1, 2, 3, 4, 5, 6]


def test_the_average_follows_the_weights_by_its_own_count_of_updates(setting):
    config, batches, new_state = setting
    state = new_state()
    twin = EMA(state.model, 0.9)
    for n, _ in enumerate(train_steps(state, batches, replace(config, steps=4))):
        twin.update(state.model, n)
    for ours, other in zip(state.ema.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_bf16_keeps_float32_weights_and_a_gradient_near_the_exact_one(setting):
    """bfloat16 has 8 significant bits; a dozen rounded products in a row may add up to some percent."""
    config, batches, new_state = setting
    state = new_state()
    exact = exact_gradients(state, batches)
    _, met = one_step(state, batches, replace(config, precision="bf16"))
    assert all(t.dtype == torch.float32 for t in [*state.model.state_dict().values(), *met.values()])
    wrong = distance(met, exact) / norm_of(exact)
    assert 1e-4 < wrong < 0.05  # more than float32 would be: the context did act


def spoil(monkeypatch, steps, value):
    """Losses of the given steps (counted from 0) become `value`."""
    real, calls = loop.training_losses, iter(range(10**6))

    def losses(*args, **kwargs):
        result = real(*args, **kwargs)
        return result._replace(loss=result.loss * value) if next(calls) in steps else result

    monkeypatch.setattr(loop, "training_losses", losses)


def snapshot(state):
    return {f"{g}.{n}": t.clone() for g, group in state.groups().items() for n, t in group.items()}


def unchanged(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.faults
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_but_the_counters(setting, monkeypatch, value):
    config, batches, new_state = setting
    spoil(monkeypatch, {2}, value)
    state = new_state()
    run = train_steps(state, batches, replace(config, steps=5))
    next(run), next(run)
    before = snapshot(state)
    report = next(run)
    assert (report.step, report.skipped) == (3, True)
    assert not math.isfinite(report.loss)
    assert unchanged(before, snapshot(state))
    assert (state.step, state.skipped) == (3, (2,))
    after = next(run)
    assert not after.skipped
    assert math.isfinite(after.loss)
    assert not unchanged(before, snapshot(state))


@pytest.mark.faults
def test_a_gradient_that_is_not_finite_is_skipped_as_well(setting):
    config, batches, new_state = setting
    state = new_state()
    handle = next(p for p in state.model.parameters() if p.requires_grad).register_hook(lambda g: g * math.inf)
    before = snapshot(state)
    (report,) = train_steps(state, batches, config)
    assert math.isfinite(report.loss)
    assert report.skipped
    assert unchanged(before, snapshot(state))
    handle.remove()


@pytest.mark.faults
def test_after_a_skipped_step_training_is_as_if_only_that_batch_had_not_been(setting, monkeypatch):
    """The average's warm-up and AdamW count the updates that were made, the data the steps."""
    config, batches, new_state = setting
    spoil(monkeypatch, {1}, math.nan)
    state = new_state()
    twin, reports, updates = EMA(state.model, 0.9), [], 0
    for report in train_steps(state, batches, replace(config, steps=3)):
        reports.append(report)
        if not report.skipped:
            twin.update(state.model, updates)
            updates += 1
    monkeypatch.undo()
    for ours, own_count in zip(state.ema.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, own_count)
    assert [r.skipped for r in reports] == [False, True, False]
    other = new_state()
    next(train_steps(other, batches, replace(config, steps=1)))
    other.step = 2
    other.guard.restore({"skipped": [1]})
    next(train_steps(other, batches, replace(config, steps=3)))
    assert unchanged(snapshot(other), snapshot(state))


@pytest.mark.faults
def test_ten_skips_in_a_thousand_steps_are_borne_and_the_eleventh_stops_the_run(setting, monkeypatch):
    config, batches, new_state = setting
    spoil(monkeypatch, set(range(2, 13)), math.nan)
    state = new_state()
    with pytest.raises(NumericError) as caught:
        list(train_steps(state, batches, replace(config, steps=100)))
    message = str(caught.value)
    assert state.skipped == tuple(range(2, 13))
    assert "11 of the last 1000 steps" in message
    assert "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12" in message
    assert "\n" not in message
    assert caught.value.exit_code == 70
    assert all(torch.isfinite(t).all() for t in state.model.state_dict().values())


def test_skips_of_long_ago_do_not_count(setting, monkeypatch):
    config, batches, new_state = setting
    spoil(monkeypatch, {0}, math.nan)
    state = new_state()
    old = tuple(range(980, 1010))  # nine of them, and the one to come, are among the last thousand
    state.step = 2000
    state.guard.restore({"skipped": old})
    (report,) = train_steps(state, batches, replace(config, steps=2001))
    assert report.skipped
    assert state.skipped == (*old, 2000)
    spoil(monkeypatch, {0}, math.nan)
    state.step = 2000
    state.guard.restore({"skipped": range(1001, 1011)})
    with pytest.raises(NumericError, match="11 of the last 1000"):
        list(train_steps(state, batches, replace(config, steps=2001)))


@pytest.mark.faults
def test_a_nan_in_the_weights_is_never_stored(setting, tmp_path):
    _, _, new_state = setting
    state, store = new_state(), CheckpointStore(tmp_path / "checkpoints")
    store.save(1, state.groups(), state.counters())
    for group in (state.model, state.ema.model):
        parameter = next(p for p in group.parameters() if p.dim() > 1)
        with torch.no_grad():
            parameter.view(-1)[0] = math.nan
        with pytest.raises(NumericError, match="not finite"):
            store.save(2, state.groups(), state.counters())
        with torch.no_grad():
            parameter.view(-1)[0] = 0
    assert store.steps() == [1]
