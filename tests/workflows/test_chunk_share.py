"""`--chunks a:b`, as job arrays say which part of the work is theirs."""

import pytest

from smalti.errors import ConfigError
from smalti.workflows.chunk_share import read_chunk_range


def test_a_range_names_chunks_up_to_the_last_there_is():
    for text, found in {"": range(7), "0:3": range(3), "5:": range(5, 7), ":2": range(2), "5:99": range(5, 7)}.items():
        assert read_chunk_range(text, chunks=7, count=100, chunk_size=16) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3", "expected a range of chunk numbers such as 0:8"),
        ("-1:3", "expected a range"),
        ("a:b", "expected a range"),
        ("٣:٤", "expected a range"),
        ("1:2:3", "expected a range"),
        ("7:9", "these 100 images are cut into chunks of 16, numbered 0 to 6"),
        ("3:3", "there is no such chunk"),
    ],
)
def test_what_is_no_range_or_an_empty_one_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        read_chunk_range(text, chunks=7, count=100, chunk_size=16)
