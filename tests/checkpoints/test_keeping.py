"""What stays, what goes, and whose it is."""

import pytest

from smalti.checkpoints import CheckpointStore
from smalti.errors import RunLockedError


def never(message):
    raise AssertionError(f"skipped: {message}")


@pytest.fixture
def save(tmp_path, faults):
    def act(step, run_id=None, *, size=1, store=None, score=None, **kw):
        def one(world):
            own = store or CheckpointStore(tmp_path, world=world, run_id=run_id, fs=faults.QuickFileSystem(), **kw)
            return own.save(step, faults.parts(world, step), {"value": step}, score=score)

        outcomes = faults.in_ranks(size, one)
        if isinstance(outcomes[0], Exception):
            assert {type(outcome) for outcome in outcomes} == {type(outcomes[0])}
            raise outcomes[0]
        return outcomes[0]

    return act


@pytest.mark.parametrize("size", [1, 2])
def test_the_best_stays_beside_the_newest(tmp_path, save, size):
    scores = [3.0, 1.0, 2.0, None, float("nan"), 1.0, 5.0, float("-inf"), 4.0]
    for step, score in enumerate(scores, start=1):
        save(step, size=size, score=score, keep_last=1, keep_best=True)
        assert CheckpointStore(tmp_path).load(step).score == (score if step not in (4, 5, 8) else None)
    assert CheckpointStore(tmp_path).steps() == [2, 9]  # of equal ones the older
    save(10, size=size, score=0.5, keep_last=1, keep_best=True)
    assert CheckpointStore(tmp_path).steps() == [10]
    save(11, size=size, score=0.6, keep_last=1)
    assert CheckpointStore(tmp_path).steps() == [11]


def test_a_checkpoint_tells_whose_it_is(tmp_path, save):
    save(1, "a")
    save(2)
    store = CheckpointStore(tmp_path, run_id="b")
    assert store.load(1).run_id == "a"
    assert store.load_newest(never).run_id is None


@pytest.mark.faults
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("theirs", [10, 11], ids=["same step", "newer"])
def test_a_newer_checkpoint_of_another_run_is_neither_replaced_nor_deleted(tmp_path, save, size, theirs):
    save(theirs, "a")
    with pytest.raises(RunLockedError, match=rf"step-00000000{theirs} of run a, and this is run b at step 10") as error:
        save(10, "b", size=size, keep_last=1)
    assert error.value.exit_code == 73
    assert CheckpointStore(tmp_path).load(theirs).run_id == "a"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", f"step-00000000{theirs}"]
    save(12, "a", size=size, keep_last=1)  # whose run it is goes on
    assert CheckpointStore(tmp_path).steps() == [12]


@pytest.mark.faults
@pytest.mark.parametrize("first", ["load", "save"])
def test_another_run_that_begins_meanwhile_is_noticed_also_when_it_is_behind(tmp_path, save, faults, first):
    save(3, "old")
    ours = CheckpointStore(tmp_path, run_id="ours", keep_last=1, fs=faults.QuickFileSystem())
    if first == "load":
        assert ours.load_newest(never).run_id == "old"
    else:
        save(9, store=ours)
    save(10, store=ours)
    elsewhere = CheckpointStore(tmp_path / "elsewhere", run_id="theirs")  # on a machine that did not see ours
    save(5, store=elsewhere).rename(tmp_path / "step-0000000005")
    with pytest.raises(RunLockedError, match="step-0000000005 of run theirs"):
        save(20, store=ours)
    with pytest.raises(RunLockedError, match="step-0000000005 of run theirs"):  # it does not get used to it
        save(20, store=ours)
    assert ours.steps() == [3, 5, 10]
    assert ours.load(5).run_id == "theirs"


def test_older_checkpoints_of_another_run_stay(tmp_path, save):
    save(1, "a")
    for step in (2, 3, 4):
        save(step, "b", keep_last=1)
    assert CheckpointStore(tmp_path).steps() == [1, 4]


def test_a_run_may_take_its_name_from_what_it_goes_on_from(tmp_path, save, faults):
    save(1, "a")
    save(2, "b", keep_last=9)
    store = CheckpointStore(tmp_path, keep_last=1, fs=faults.QuickFileSystem())
    store.name_run(store.load_newest(never).run_id)
    save(3, store=store)
    assert store.steps() == [1, 3]
    assert store.load(3).run_id == "b"
    elsewhere = CheckpointStore(tmp_path / "elsewhere", run_id="c")
    save(2, store=elsewhere).rename(tmp_path / "step-0000000002")
    with pytest.raises(RunLockedError, match="of run c"):
        save(4, store=store)
