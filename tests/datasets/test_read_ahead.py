"""When neighbours in a far file are worth fetching together."""

import pytest

from smalti.data import read_ahead as read_ahead_module
from smalti.data.read_ahead import ReadAhead, pays


@pytest.mark.parametrize(
    ("what", "each", "stretch", "in_it", "least"),
    [
        # least n with 128 KiB + stretch <= 2 n (128 KiB + each)
        ("photographs", 110_000, 8 << 20, 70, 18),
        ("large photographs", 2 << 20, 8 << 20, 4, 2),
        ("latents with mirrors", 16 << 10, 4 << 20, 128, 15),
        ("images of 250 bytes, of which a tar makes 2,048", 250, 2 << 20, 1024, 9),
        ("eight of them", 250, 16 << 10, 8, 1),
    ],
)
def test_a_stretch_pays_if_single_reads_of_what_is_used_cost_more_than_half_of_it(what, each, stretch, in_it, least):
    assert pays(10, 10 * stretch, 10 * least, 10 * least * each), what
    assert not pays(10, 10 * stretch, 10 * (least - 1), 10 * (least - 1) * each), what
    assert 2 * least <= in_it, "the share of one process in two is enough"


class Zeros:
    def __init__(self):
        self.asked = []

    def read(self, name, start, stop):
        self.asked.append(stop - start)
        return bytes(stop - start)


@pytest.mark.parametrize(
    ("request_bytes", "size", "reads", "stays"),
    [(0, 100, 10, True), (0, 100, 4, False), (100, 1, 10, True), (100, 1, 3, False)],
    ids=["many bytes", "few bytes", "many reads", "few reads"],
)
def test_what_is_used_of_a_stretch_is_counted_in_bytes_and_in_reads(monkeypatch, request_bytes, size, reads, stays):
    monkeypatch.setattr(read_ahead_module, "REQUEST_BYTES", request_bytes)
    monkeypatch.setattr(read_ahead_module, "HELD_BYTES", 1000)
    store = Zeros()
    ahead = ReadAhead(store)
    for number in range(12):
        for read in range(reads):
            assert ahead.read(f"{number}", 100 * read, 100 * read + size, 0, 1000) == bytes(size)
    # The fifth is fetched before the fourth has been let go of.
    assert store.asked == ([1000] * 12 if stays else [1000] * 5 + [size] * reads * 7)
