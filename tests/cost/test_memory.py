"""Peak memory against allocations of known size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smalti.cost import memory as memory_module
from smalti.cost import peak_memory, peak_memory_refusal
from smalti.errors import ConfigError

needs_proc = pytest.mark.skipif(bool(peak_memory_refusal("cpu")), reason=peak_memory_refusal("cpu") or "can measure")

# In a process of its own: threads and caches that other tests leave behind take and give back pages while it measures.
PROGRAM = """
import json, torch
from smalti.cost import peak_memory

MIB = 2**20

def hold(mebibytes):
    torch.ones(mebibytes * MIB // 4)

def measure(work):
    found = peak_memory(work, "cpu")
    return [found.added / MIB, found.peak, found.before]

hold(1)
small, large = measure(lambda: hold(64)), measure(lambda: hold(192))
hold(256)
after_more = measure(lambda: hold(64))
twice = measure(lambda: (hold(96), hold(96)))
print(json.dumps({"small": small, "large": large, "after more": after_more, "twice": twice}))
"""


@pytest.fixture(scope="module")
def measured():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    return json.loads(run.stdout)


@needs_proc
@pytest.mark.parametrize(
    ("work", "mebibytes"),
    [
        pytest.param("small", 64, id="what the work held at once"),
        pytest.param("large", 192, id="and more of it"),
        pytest.param("after more", 64, id="not an earlier, higher peak and freed memory"),
        pytest.param("twice", 96, id="work one after the other once"),
    ],
)
def test_the_peak_is(measured, work, mebibytes):
    added, peak, before = measured[work]
    # The kernel batches its page counts per core: a few MiB either way.
    assert abs(added - mebibytes) < 8
    assert peak > before > 0


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
