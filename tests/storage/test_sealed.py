"""Sealed documents: whatever the bytes are, they are those that were written or one line says that they are not."""

import json

import pytest

from smalti.errors import CheckpointError
from smalti.storage.sealed import NewerFormatError, check_format, seal, unseal

WHOLE = {"format": "a document", "version": 2, "of": ["x", 1.5, None]}


def test_what_was_sealed_comes_back():
    assert unseal(seal(WHOLE), "it") == WHOLE


def test_every_flipped_bit_is_found():
    data = seal(WHOLE)
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(CheckpointError, match=r"^it (is damaged|was changed)"):
            unseal(bytes(flipped), "it")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"3",
        b"null",
        b'"digest"',
        b"[" * 100_000,
        json.dumps(WHOLE).encode(),
        seal(WHOLE).replace(b"1.5", b"2.5"),
        seal(WHOLE) + b" ",
        json.dumps(json.loads(seal(WHOLE))).encode(),
    ],
)
def test_what_was_not_sealed_is_refused_in_one_line(data):
    with pytest.raises(CheckpointError, match=r"^it (is damaged|was changed).*$"):
        unseal(data, "it")


@pytest.mark.parametrize("change", [{"format": "another"}, {"format": None}, {"version": "2"}, {"version": None}])
def test_another_format_is_refused_by_name(change):
    with pytest.raises(CheckpointError, match="expected 'a document'"):
        check_format(WHOLE | change, "a document", 2, "it")


def test_only_newer_versions_are_refused():
    for version in (2, 3):
        check_format(WHOLE, "a document", version, "it")
    with pytest.raises(NewerFormatError, match=r"of format version 2, .* reads up to version 1: update it"):
        check_format(WHOLE, "a document", 1, "it")
