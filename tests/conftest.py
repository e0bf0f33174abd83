"""What every test runs under: one thread per process, and repeatable kernels for the modules that ask."""

import os

# Before torch is imported, and for the processes that tests start: `make test` already runs one worker per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--full-faults", action="store_true", help="rows of the failure table at full count: make test-faults"
    )


@pytest.fixture(scope="session")
def how_often(request):
    """`how_often(40, 200)`: the count of a row of the failure table in `make test`, and in `make test-faults`."""
    full = request.config.getoption("--full-faults")
    return lambda short, whole: whole if full else short


@pytest.fixture
def deterministic():
    """Repeatable kernels only; fresh memory is filled with NaN, so that reading it before writing it shows.

    A module asks with `pytestmark = pytest.mark.usefixtures("deterministic")`.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def seeded():
    """The same initial weights in every run, and the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def no_shape_checks(monkeypatch):
    """As users run it, for tests of our own messages about shapes: the checks of the test run would speak first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
