"""Equal ones among millions, by sorting numbers: tables of as many Python objects take gigabytes."""

import hashlib
from collections.abc import Iterable

import numpy as np


def text_digests(texts: Iterable[str], count: int) -> np.ndarray:
    """uint64 (count, 2): half of the SHA-256 of each text, spelled as `os.fsdecode` does."""
    packed = bytearray()
    for text in texts:
        packed += hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:16]
    return np.frombuffer(packed, "<u8").reshape(count, 2)


def grouped(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group of each row, first row of each group) of uint64 (N, 2); equal rows are one group."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so that the first of a group comes first
    previous, following = digests[order[:-1]], digests[order[1:]]
    new = np.concatenate([np.ones(min(1, len(order)), bool), (previous != following).any(axis=1)])
    group_of = np.empty(len(order), np.int64)
    group_of[order] = np.cumsum(new) - 1
    return group_of, order[new]
