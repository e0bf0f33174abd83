"""Peak memory against allocations of known size."""

import sys

import pytest
import torch

from smalti.cost import memory as memory_module
from smalti.cost import peak_memory, peak_memory_refusal
from smalti.errors import ConfigError

MIB = 2**20
needs_proc = pytest.mark.skipif(bool(peak_memory_refusal("cpu")), reason=peak_memory_refusal("cpu") or "can measure")


def hold(mebibytes: int) -> None:
    torch.ones(mebibytes * MIB // 4)


@needs_proc
@pytest.mark.parametrize("mebibytes", [64, 192])
def test_the_peak_is_what_the_work_held_at_once(mebibytes):
    hold(1)
    found = peak_memory(lambda: hold(mebibytes), "cpu")
    # The kernel batches its page counts per core: a few MiB either way.
    assert abs(found.added / MIB - mebibytes) < 8
    assert found.peak > found.before > 0


@needs_proc
def test_an_earlier_higher_peak_and_freed_memory_do_not_count():
    hold(256)
    assert abs(peak_memory(lambda: hold(64), "cpu").added / MIB - 64) < 8


@needs_proc
def test_work_one_after_the_other_counts_once():
    def twice() -> None:
        hold(96)
        hold(96)

    assert abs(peak_memory(twice, "cpu").added / MIB - 96) < 8


def test_a_device_without_a_counter_says_so():
    assert "mps" in peak_memory_refusal("mps")
    with pytest.raises(ConfigError, match="mps has no counter"):
        peak_memory(lambda: None, "mps")


def test_another_system_says_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in peak_memory_refusal("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="the file is Linux's")
def test_a_kernel_that_refuses_the_reset_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_module, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    reason = peak_memory_refusal("cpu")
    assert "No such file" in reason or "malloc_trim" in reason
