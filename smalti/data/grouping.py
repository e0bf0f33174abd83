"""Equal ones among millions, by sorting numbers: tables of as many Python objects take gigabytes."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from smalti.data.made_names import MadeNames

_AT_ONCE = 1 << 16  # rows, or texts as Python objects


def text_digests(texts: Iterable[str], count: int) -> np.ndarray:
    """uint64 (count, 2): half of the SHA-256 of each text, spelled as `os.fsdecode` does."""
    if isinstance(texts, MadeNames):
        spelled = texts.spelled()
    else:
        spelled = (text.encode("utf-8", "surrogateescape") for text in texts)
    digests, at, sha256 = np.empty((count, 2), np.uint64), 0, hashlib.sha256
    while piece := b"".join([sha256(text).digest() for text in itertools.islice(spelled, _AT_ONCE)]):
        rows = np.frombuffer(piece, "<u8").reshape(-1, 4)[:, :2]
        digests[at : at + len(rows)] = rows
        at += len(rows)
    if at != count:
        raise ValueError(f"{at} texts, {count} were expected")
    return digests


def equal_rows(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(rows that equal an earlier one, for each of them the first one that it equals), both int64.

    Only rows of which the first number comes twice are compared as a whole; where few are equal, that is next to none.

    Args:
        parts: uint64 (N, 2), the rows of which are counted through all parts.
    """
    first = np.concatenate([np.zeros(0, np.uint64), *(part[:, 0] for part in parts)])
    first.sort()
    twice = np.unique(first[1:][first[1:] == first[:-1]])
    del first
    places, found, start = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.uint64)], 0
    for part in parts:
        chosen = np.flatnonzero(is_among(part[:, 0], twice))
        places.append(start + chosen)
        found.append(part[chosen])
        start += len(part)
    rows, digests = np.concatenate(places), np.concatenate(found)
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so that the first of a group comes first
    rows, digests = rows[order], digests[order]
    new = np.concatenate([np.ones(min(1, len(rows)), bool), (digests[1:] != digests[:-1]).any(axis=1)])
    group = np.cumsum(new) - 1
    return rows[~new], rows[new][group[~new]]


def is_among(numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of many numbers are among a few that rise."""
    if not len(wanted):
        return np.zeros(len(numbers), bool)
    places = np.searchsorted(wanted, numbers)
    places[places == len(wanted)] = 0
    return np.asarray(wanted[places] == numbers)


def in_parts(rows: np.ndarray) -> list[np.ndarray]:
    """A long array as short ones, so that what is made of one of them is short too."""
    return [rows[first : first + _AT_ONCE] for first in range(0, len(rows), _AT_ONCE)]
