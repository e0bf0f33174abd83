"""Worker processes make the same bits as none, and whatever happens to them, the training process hears of it."""

import functools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import array_images

from smalti.checkpoints.lock import RunLock
from smalti.data import SampleOrder
from smalti.data.examples import PixelExamples
from smalti.diffusion.levels import build_schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import DataError, NumericError
from smalti.storage.chunks import DamagedChunkError
from smalti.training.batches import BatchSource
from smalti.training.prefetch import Prefetched, WorkerDiedError, prefetched

SECONDS = 40  # of patience for what takes a tenth of a second on an idle machine


@pytest.fixture(autouse=True)
def _no_child_is_left_behind():
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture
def batches():
    pixels = np.random.default_rng(5).integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    images = array_images(pixels, np.arange(37) % 4)
    return BatchSource(
        examples=PixelExamples(images),
        order=SampleOrder(range(37), 3),
        schedule=build_schedule("linear", 1000),
        objective=ObjectiveConfig(),
        null_class=4,
        flip=True,
        seed=3,
    )


def test_batches_are_the_same_bits_in_the_same_order_with_any_number_of_workers(batches):
    def columns(step):
        batch = batches.at(step * 16, 16)
        return batch.x0, batch.class_labels, batch.eps, batch.levels.timesteps, torch.tensor(list(batch.positions))

    expected = [columns(step) for step in range(5, 12)]
    for workers in (0, 1, 2, 9):
        with prefetched(columns, 5, 12, workers=workers) as made:
            found = list(made)
        assert len(found) == 7
        for one, other in zip(expected, found, strict=True):
            for a, b in zip(one, other, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def test_whole_batches_of_a_run_cross_with_all_that_they_hold(batches):
    with prefetched(lambda step: batches.at(step * 4, 4), 0, 3, workers=1) as made:
        for step, batch in enumerate(made):
            assert (batch.positions, len(batch)) == (range(step * 4, step * 4 + 4), 4)
            assert torch.equal(batch.indices, batches.at(step * 4, 4).indices)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_crosses_is_writable_keeps_its_kind_and_may_be_empty(workers):
    def load(step):
        return {
            "bf16": torch.full((3, 2), step, dtype=torch.bfloat16),
            "strided": torch.arange(12).reshape(3, 4).T,
            "scalar": torch.tensor(step),
            "none": torch.empty(0, 3),
            "bits": torch.tensor([True, False]),
            "array": np.arange(5, dtype=np.int16),
            "text": "x",
        }

    with prefetched(load, 0, 3, workers=workers) as made:
        for step, found in enumerate(made):
            for name, value in load(step).items():
                if isinstance(value, torch.Tensor):
                    assert found[name].dtype == value.dtype
                    assert torch.equal(found[name], value)
                    found[name] += 1 if value.dtype != torch.bool else False
                elif isinstance(value, np.ndarray):
                    assert found[name].dtype == value.dtype
                    assert found[name].tolist() == value.tolist()
                else:
                    assert found[name] == value


def test_a_worker_computes_with_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with prefetched(lambda step: torch.get_num_threads(), 0, 2, workers=2) as made:
            assert list(made) == [1, 1]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="asks the Linux kernel")
def test_a_worker_holds_no_end_of_the_pipe_of_another():
    """Else that pipe would outlive its reader, and its worker would wait for ever to be heard."""

    def held(step):
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return {os.readlink(link) for link in links if link.is_fifo()}

    with prefetched(held, 0, 3, workers=3) as made:
        pipes = [os.readlink(f"/proc/self/fd/{worker.pipe.fileno()}") for worker in made._workers]
        assert [theirs.intersection(pipes) for theirs in made] == [{pipe} for pipe in pipes]


def test_no_steps_are_no_batches_and_impossible_numbers_are_refused():
    with prefetched(str, 4, 4, workers=3) as made:
        assert list(made) == []
    with pytest.raises(ValueError, match="-1 workers"):
        prefetched(str, 0, 4, workers=-1)
    with pytest.raises(ValueError, match="steps 4 to 0"):
        prefetched(str, 4, 0, workers=1)


def test_workers_run_ahead_by_one_batch_each_and_no_further():
    made = multiprocessing.Value("i", 0)

    def load(step):
        with made.get_lock():
            made.value += 1
        return torch.zeros(1 << 20)  # more than a pipe holds

    with prefetched(load, 0, 100, workers=2) as batches:
        next(batches)
        deadline = time.monotonic() + SECONDS
        while made.value < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made.value == 3


@pytest.mark.faults
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_an_error_that_names_the_step_and_its_examples(workers):
    def load(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(step)

    started, seen = time.monotonic(), []
    with (
        pytest.raises(WorkerDiedError, match=r"killed by SIGKILL while it made step 5 \(examples 5, 55\)") as caught,
        prefetched(load, 0, 50, workers=workers, describe=lambda step: f"examples {step}, {step}{step}") as made,
    ):
        seen.extend(int(one) for one in made)
    assert seen == [0, 1, 2, 3, 4]
    assert time.monotonic() - started < SECONDS
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code not in (0, 2)


@pytest.mark.faults
def test_a_worker_killed_while_it_waits_is_noticed_at_its_next_batch():
    with prefetched(lambda step: torch.zeros(1 << 20), 0, 50, workers=2) as made:
        next(made)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(WorkerDiedError, match="killed by SIGKILL"):
            for _ in made:
                pass
        assert time.monotonic() - started < SECONDS


@pytest.mark.timeout(60)
def test_a_killed_worker_is_noticed_although_another_process_holds_the_end_of_its_pipe(monkeypatch):
    """As one does that a thread forks at the same moment: the pipe tells of no end."""
    real, held = multiprocessing.context.BaseContext.Pipe, []

    def pipe(context, duplex):
        ours, theirs = real(context, duplex)
        held.append(os.dup(theirs.fileno()))
        return ours, theirs

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Pipe", pipe)
    try:
        with prefetched(lambda step: os.kill(os.getpid(), signal.SIGKILL), 3, 9, workers=1) as made:
            assert len(held) == 1
            with pytest.raises(WorkerDiedError, match="killed by SIGKILL while it made step 3"):
                next(made)
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_a_worker_that_ends_on_its_own_is_noticed_too():
    def load(step):
        os._exit(3)

    with pytest.raises(WorkerDiedError, match="ended with exit code 3 while it made step 7"):
        next(prefetched(load, 7, 9, workers=1))


@pytest.mark.parametrize(
    "error",
    [DataError("folder: 'a.png': changed"), NumericError("too many"), DamagedChunkError("chunk 3 is damaged", 3)],
)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_errors_that_users_can_mend_arrive_as_they_were_raised(error, workers):
    def load(step):
        if step == 2:
            raise error
        return step

    seen = []
    with pytest.raises(type(error)) as caught, prefetched(load, 0, 9, workers=workers) as made:
        seen.extend(made)
    assert seen == [0, 1]
    assert str(caught.value) == str(error)
    assert caught.value.exit_code == error.exit_code
    assert not getattr(caught.value, "__notes__", [])


class AwkwardError(DataError):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def test_errors_that_cannot_be_made_again_keep_their_message_and_exit_code():
    def load(step):
        raise AwkwardError("this", "that")

    with pytest.raises(Exception, match=r"^this and that$") as caught:
        next(prefetched(load, 0, 9, workers=1))
    assert caught.value.exit_code == DataError.exit_code


def test_a_bug_arrives_with_the_traceback_of_where_it_happened():
    def of_our_own_mistake(step):
        return [][step]

    with pytest.raises(IndexError, match="out of range") as caught:
        next(prefetched(of_our_own_mistake, 0, 9, workers=1))
    assert "of_our_own_mistake" in caught.value.__notes__[0]
    with pytest.raises(Exception, match="pickle"):
        next(prefetched(lambda step: lambda: step, 0, 9, workers=1))


def test_signals_to_the_whole_group_leave_the_workers_working():
    def load(step):
        time.sleep(0.02)
        return torch.zeros(1 << 20) + step

    with prefetched(load, 0, 8, workers=2) as made:
        assert float(next(made)[0]) == 0  # the workers are up
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
            os.kill(child.pid, signal.SIGTERM)
        assert [int(one[0]) for one in made] == list(range(1, 8))


def test_leaving_early_ends_workers_that_are_busy():
    started = time.monotonic()
    with prefetched(lambda step: time.sleep(60), 0, 8, workers=2):
        pass
    assert time.monotonic() - started < SECONDS


def _hold_and_wait(folder, ready):
    with RunLock(folder), prefetched(lambda step: time.sleep(4), 0, 8, workers=2) as made:
        ready.set()
        next(made)


@pytest.mark.faults
def test_workers_do_not_hold_the_lock_of_a_run_whose_process_was_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold_and_wait, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(SECONDS)
    holder.kill()
    holder.join()
    with RunLock(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork") or not os.path.exists("/proc/self"), reason="asks the Linux kernel")
def test_a_worker_that_is_busy_ends_with_the_process_it_works_for(tmp_path):
    """Its next batch, at which it would notice a broken pipe, is a minute away."""
    note = tmp_path / "worker"

    def load(step):
        (tmp_path / "half").write_text(str(os.getpid()))
        os.replace(tmp_path / "half", note)
        time.sleep(60)

    child = os.fork()
    if not child:
        try:
            next(prefetched(load, 0, 4, workers=1))
        finally:
            os._exit(0)
    deadline = time.monotonic() + SECONDS
    while not note.exists():
        assert time.monotonic() < deadline, "no worker has begun"
        time.sleep(0.01)
    worker = int(note.read_text())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + SECONDS
    while not ended(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended(worker)


def ended(process):
    """Gone, or a zombie that nobody has asked after yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_where_there_are_no_forks_a_picklable_function_does():
    with Prefetched(functools.partial(torch.full, (2, 3)), 4, 6, 1, False, None, "spawn") as made:
        assert [one.tolist() for one in made] == [[[4] * 3] * 2, [[5] * 3] * 2]
