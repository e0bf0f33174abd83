"""Which steps are left out, when a run gives up, and that a resumed guard decides as one that never stopped."""

import errno
import json
import math
import random
import statistics

import pytest

from smalti.errors import CheckpointError, NumericError
from smalti.storage.filesystem import LocalFileSystem
from smalti.training.config import GuardConfig
from smalti.training.guard import REWINDS, Guard

BATCH = 4
SPIKES = GuardConfig(spike_factor=10.0)


def judge(guard, step, norm=1.0, loss=0.5):
    return guard.judge(step, loss, norm, range(step * BATCH, (step + 1) * BATCH))


def warm(guard, steps=20, norm=1.0):
    for step in range(steps):
        assert judge(guard, step, norm) == "step"
    return guard


@pytest.mark.faults
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
@pytest.mark.parametrize("config", [GuardConfig(), SPIKES, GuardConfig(spike_factor=10.0, on_spike="rewind")])
def test_a_number_that_is_not_finite_is_always_skipped(config, where, bad):
    guard = Guard(config)
    assert judge(guard, 0, **{where: bad}) == "skip"
    assert guard.skipped == (0,)
    assert guard.rewinds == ()
    assert judge(guard, 1) == "step"


def test_without_a_factor_no_norm_is_too_large():
    guard = warm(Guard(GuardConfig()), 100)
    assert judge(guard, 100, 1e30) == "step"


@pytest.mark.faults
def test_a_spike_is_a_norm_above_the_factor_times_the_running_median():
    guard = warm(Guard(SPIKES), 20, 2.0)
    assert judge(guard, 20, 20.0) == "step"
    assert judge(guard, 21, math.nextafter(20.0, 21)) == "skip"
    assert guard.skipped == (21,)


def test_with_fewer_than_twenty_norms_nothing_is_a_spike():
    guard = warm(Guard(SPIKES), 19)
    assert judge(guard, 19, 1e6) == "step"
    assert judge(guard, 20, 1e6) == "skip"


def test_norms_below_the_floor_are_no_spike():
    guard = warm(Guard(GuardConfig(spike_factor=10.0, spike_floor=50.0)))
    assert judge(guard, 20, 50.0) == "step"
    assert judge(guard, 21, 50.1) == "skip"


def test_the_median_is_that_of_the_last_hundred_accepted_norms():
    guard, accepted, rng = Guard(GuardConfig(spike_factor=3.0, skip_budget=10**6)), [], random.Random(0)
    for step in range(500):
        norm = math.exp(rng.gauss(step / 400, 1))
        spike = len(accepted) >= 20 and norm > 3 * statistics.median(accepted[-100:])
        assert judge(guard, step, norm) == ("skip" if spike else "step")
        accepted += [] if spike else [norm]
    assert 10 < len(guard.skipped) < 200


@pytest.mark.faults
@pytest.mark.parametrize("budget", [0, 1, 10])
def test_a_run_gives_up_when_the_budget_is_exceeded_and_writes_what_is_known(tmp_path, budget):
    guard = warm(Guard(GuardConfig(skip_budget=budget, spike_factor=10.0), tmp_path))
    kinds = [{"norm": 100.0}, {"loss": math.nan}, {"norm": math.inf}]
    for k in range(budget):
        assert judge(guard, 20 + 2 * k, **kinds[k % 3]) == "skip"
        assert judge(guard, 21 + 2 * k) == "step"
    last = 20 + 2 * budget
    with pytest.raises(NumericError) as caught:
        judge(guard, last, **kinds[budget % 3])
    message = str(caught.value)
    assert f"{budget + 1} of the last 1000 steps" in message
    assert "\n" not in message
    assert caught.value.exit_code == 70
    (path,) = tmp_path.iterdir()
    assert str(path) in message
    report = json.loads(path.read_text())
    assert report["step"] == last
    assert [r["step"] for r in report["skipped"]] == list(range(20, last + 1, 2))
    first = {"step": 20, "loss": 0.5, "norm": 100.0, "positions": [80, 84], "reason": "norm above 10"}
    assert report["skipped"][0] == first
    if budget:
        assert (report["skipped"][1]["loss"], report["skipped"][1]["reason"]) == ("nan", "not finite")
    assert report["recent_norms"] == [1.0] * (20 + budget)


@pytest.mark.faults
def test_skips_of_more_than_a_thousand_steps_ago_do_not_count():
    guard = Guard(GuardConfig(skip_budget=1))
    assert judge(guard, 0, math.nan) == "skip"
    assert judge(guard, 1000, math.nan) == "skip"
    with pytest.raises(NumericError, match=r"2 of the last 1000 steps .* \(steps 1000, 1999\)"):
        judge(guard, 1999, math.nan)


@pytest.mark.faults
def test_a_full_disk_does_not_hide_why_the_run_gave_up(tmp_path):
    class Full(LocalFileSystem):
        def create(self, path):
            raise OSError(errno.ENOSPC, "No space left on device")

    guard = Guard(GuardConfig(skip_budget=0), tmp_path, fs=Full())
    with pytest.raises(NumericError, match=r"1 of the last 1000 .* No report: .* No space left on device"):
        judge(guard, 0, math.nan)


def decisions(guard, events, stop=None):
    """What a run does: (step, verdict) until the end, a stop or a rewind."""
    made = []
    for step, loss, norm in events:
        if step == stop:
            break
        if guard.passes_over(step):
            made.append((step, "passed over"))
            continue
        made.append((step, judge(guard, step, norm, loss)))
        if made[-1][1] == "rewind":
            break
    return made


def random_events(count, seed):
    rng = random.Random(seed)
    return [
        (step, math.nan if rng.random() < 0.01 else rng.random(), math.exp(rng.gauss(0, 1.2))) for step in range(count)
    ]


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_a_guard_restored_from_json_anywhere_decides_as_one_that_never_stopped(seed):
    config, events = GuardConfig(spike_factor=4.0, skip_budget=10**6), random_events(300, seed)
    whole = Guard(config)
    expected = decisions(whole, events)
    assert {"step", "skip"} == {verdict for _, verdict in expected}
    for stop in range(0, 300, 7):
        first, second = Guard(config), Guard(config)
        made = decisions(first, events, stop)
        second.restore(json.loads(json.dumps(first.counters())))
        made += decisions(second, events[stop:])
        assert made == expected
        assert second.skipped == whole.skipped
        assert json.dumps(second.counters()) == json.dumps(whole.counters())


def test_what_runs_stored_before_there_was_a_median_is_still_read():
    guard = Guard(GuardConfig(skip_budget=2))
    guard.restore({"step": 900, "skipped": [3, 500]})
    assert guard.skipped == (3, 500)
    with pytest.raises(NumericError, match=r"steps 3, 500, 900"):
        judge(guard, 900, math.nan)


REWIND = GuardConfig(spike_factor=10.0, on_spike="rewind")


def test_a_rewind_passes_over_the_batch_of_the_spike_and_counts_it_once(tmp_path):
    guard = warm(Guard(REWIND, tmp_path), 25)
    stored = guard.counters()
    assert judge(guard, 25, 100.0) == "rewind"
    guard.restore(stored)
    assert guard.skipped == ()
    assert [guard.passes_over(step) for step in (24, 25, 25, 26)] == [False, True, True, False]
    assert guard.skipped == (25,)


@pytest.mark.faults
def test_a_kill_during_the_replay_forgets_no_rewind(tmp_path):
    guard = warm(Guard(REWIND, tmp_path), 25)
    stored = guard.counters()
    assert judge(guard, 25, 100.0) == "rewind"
    again = Guard(REWIND, tmp_path)  # a new process, before anything else was stored
    again.restore(json.loads(json.dumps(stored)))
    assert again.rewinds == (25,)
    assert again.passes_over(25)
    other = Guard(REWIND)
    other.adopt(again.rewinds)
    other.restore(stored)
    assert other.passes_over(25)
    assert other.counters() == again.counters()
    elsewhere = Guard(REWIND, tmp_path / "new")  # the checkpoint came without its run folder
    elsewhere.restore(json.loads(json.dumps(again.counters())))
    assert elsewhere.rewinds == (25,)


@pytest.mark.faults
def test_a_damaged_list_of_rewinds_is_not_taken_for_an_empty_one(tmp_path):
    assert judge(warm(Guard(REWIND, tmp_path)), 20, 100.0) == "rewind"
    path = tmp_path / REWINDS
    for data in (path.read_bytes().replace(b"20", b"21", 1), path.read_bytes()[:-9], b""):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=REWINDS):
            Guard(REWIND, tmp_path)


@pytest.mark.faults
def test_rewinds_cannot_go_on_for_ever(tmp_path):
    """Every batch after the first twenty is a spike; each return goes to the checkpoint of step 20."""
    guard = warm(Guard(REWIND, tmp_path))
    stored, events = guard.counters(), [(step, 0.5, 100.0) for step in range(20, 10**4)]
    for k in range(10):
        assert decisions(guard, events) == [*((s, "passed over") for s in range(20, 20 + k)), (20 + k, "rewind")]
        guard.restore(stored)
    with pytest.raises(NumericError, match="11 of the last 1000 steps"):
        decisions(guard, events)
    assert len(json.loads((tmp_path / "numeric-error-0000000030.json").read_text())["skipped"]) == 11
    again = Guard(REWIND, tmp_path)  # a restart does not get a fresh budget
    again.restore(stored)
    with pytest.raises(NumericError, match="11 of the last 1000 steps"):
        decisions(again, events)
