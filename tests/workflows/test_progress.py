"""Progress where nobody watches a bar: few plain lines that a person can read."""

import io
import re

import pytest

from smalti.workflows import progress
from smalti.workflows.progress import ProgressReport


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def _lines(out):
    return out.getvalue().splitlines()


def test_a_line_says_how_far_how_fast_and_how_long_still_and_the_last_one_how_long_it_took(clock):
    out = io.StringIO()
    with ProgressReport("drawing", 50_000, unit="images", out=out) as report:
        clock[0] += 20
        report.update(2_000)
        report.update(2_001)  # nobody reads a line for each image
        clock[0] += 480
        report.update(50_000)
        report.update(50_000)
    assert _lines(out) == [
        "drawing 2,000/50,000, 100 images/s, 8:00 left",
        "drawing 50,000/50,000, 100 images/s, in 8:20",
    ]


@pytest.mark.parametrize(
    ("done", "says"), [(1, "0.05 images/s, 138 days left"), (600, "30 images/s, 5:33:00 left"), (0, "0 images/s")]
)
def test_long_times_are_told_in_hours_and_days(clock, done, says):
    out = io.StringIO()
    with ProgressReport("drawing", 600_000, unit="images", out=out) as report:
        clock[0] += 20
        report.update(done)
    assert re.search(rf", {re.escape(says)}$", _lines(out)[0])
