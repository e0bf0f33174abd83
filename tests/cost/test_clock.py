"""Timings that can be told from nonsense: known durations, known orders, interleaving."""

import time

import pytest
import torch

from smalti.cost import Gemm, clock_name, gemm_rate, measure, measure_interleaved


def spin(seconds: float) -> None:
    """Keep the CPU busy: sleeping would not show on a clock of CPU time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_known_duration_is_measured():
    timing = measure(lambda: spin(0.01), repeats=3)
    # The function itself waits on the same clock, so it can never take less.
    assert 0.01 <= timing.fastest <= timing.median <= timing.slowest
    assert timing.fastest < 0.02
    assert (timing.repeats, timing.calls) == (3, 1)


def test_one_thread_reads_cpu_time_and_is_blind_to_waiting():
    assert clock_name("cpu") == "cpu time"
    assert measure(lambda: time.sleep(0.05), repeats=1).median < 0.02


def test_several_threads_read_wall_time():
    torch.set_num_threads(2)
    assert clock_name("cpu") == "wall time"
    assert measure(lambda: time.sleep(0.02), repeats=1).median >= 0.02


def test_functions_take_turns_after_their_warmup():
    order: list[str] = []
    timings = measure_interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=2)
    assert "".join(order) == "aabb" + "ab" * 3
    assert set(timings) == {"a", "b"}


def test_short_functions_are_called_many_times_for_one_sample():
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        spin(0.0005)

    timing = measure(run, repeats=2, warmup=1, min_seconds=0.01)
    assert 5 <= timing.calls <= 20
    assert calls == 2 + 2 * timing.calls  # warm-up, one call to find out how many, then the samples
    assert 0.0005 <= timing.median < 0.001


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_impossible_repeats_are_refused(repeats, warmup):
    with pytest.raises(ValueError, match="repeats"):
        measure(lambda: None, repeats=repeats, warmup=warmup)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_a_matrix_product_is_its_multiply_adds_by_its_time(dtype):
    gemm = Gemm(dtype, torch.device("cpu"), 256)
    assert gemm.macs == 256**3
    left, right = gemm._operands
    torch.testing.assert_close(gemm(), left @ right.T)
    rate = gemm_rate(dtype, "cpu", size=256, repeats=9)
    # One core: below any machine would be a count of the wrong thing, above it a unit mistaken by a thousand.
    assert 1e7 < rate < 1e14
    expected = gemm.macs / measure(gemm, repeats=9).median
    assert 0.2 < rate / expected < 5


def test_a_product_eight_times_as_large_takes_longer_at_a_similar_rate():
    small, large = (Gemm(torch.float32, torch.device("cpu"), size) for size in (192, 384))
    times = measure_interleaved({"small": small, "large": large}, repeats=9, warmup=2, min_seconds=0.003)
    assert 3 < times["large"].median / times["small"].median < 20


def test_a_product_of_integers_is_refused():
    with pytest.raises(ValueError, match="floating dtype"):
        Gemm(torch.int32, torch.device("cpu"))
