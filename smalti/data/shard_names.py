"""The names in tar shards, as views of their paths: of millions of examples the paths alone are half a gigabyte."""

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized

import numpy as np

from smalti.data.index_file import PackedNames
from smalti.data.made_names import MadeNames

_AT_ONCE = 1 << 12  # names as arrays of numbers, which take many times the bytes of their text
_SLASH, _DOT = b"/."
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_INVERSE = pow(_BASE, -1, 1 << 64)


def key_of(path: str) -> tuple[str, str]:
    """(key, rest): the path up to the first dot of the file name, and what follows that dot."""
    folder, slash, file = path.rpartition("/")
    key, _, rest = file.partition(".")
    return folder + slash + key, rest


class KeyNames(MadeNames):
    """The keys of paths, which are their beginnings."""

    def __init__(self, paths: PackedNames) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return key_of(self.paths[index])[0]

    def spelled(self) -> Iterator[bytes | memoryview]:
        for text, starts, stops in self._pieces():
            data = text.tobytes()
            yield from [data[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]

    def hashes(self) -> np.ndarray:
        """A number for each, uint64: equal for equal keys, and seldom for others."""
        found = [np.zeros(0, np.uint64)]
        for text, starts, stops in self._pieces():
            # The sum of letter * base**place, divided by base**start: of any stretch from one sum over all letters.
            powers, inverses = _powers(1 << len(text).bit_length())
            sums = np.zeros(len(text) + 1, np.uint64)
            np.cumsum(powers[: len(text)] * (text.astype(np.uint64) + np.uint64(1)), out=sums[1:])
            found.append((sums[stops] - sums[starts]) * inverses[starts])
        return np.concatenate(found)

    def are(self, keys: PackedNames) -> bool:
        """Whether the keys are these."""
        if len(keys) != len(self):
            return False
        theirs, first, at = np.frombuffer(keys.text, np.uint8), 0, 0
        for text, starts, stops in self._pieces():
            ends = at + np.cumsum(stops - starts)
            inside = np.bincount(starts, minlength=len(text) + 1) - np.bincount(stops, minlength=len(text) + 1)
            letters = text[np.cumsum(inside)[:-1] > 0]
            if not np.array_equal(keys.ends[first : first + len(ends)], ends):
                return False
            if not np.array_equal(theirs[at : at + len(letters)], letters):
                return False
            first, at = first + len(ends), int(ends[-1])
        return True

    def _pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(letters, where the keys start in them, where they stop), of some paths at a time."""
        letters, ends, begin = np.frombuffer(self.paths.text, np.uint8), self.paths.ends, 0
        for first in range(0, len(ends), _AT_ONCE):
            stops = ends[first : first + _AT_ONCE].astype(np.int64) - begin
            starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
            text = letters[begin : begin + int(stops[-1])]
            begin += len(text)
            # The file name begins after the last slash; the key ends with the first dot of the file name.
            slashes = np.concatenate([np.full(1, -1), np.flatnonzero(text == _SLASH)])
            file = np.maximum(starts, slashes[np.searchsorted(slashes, stops) - 1] + 1)
            dots = np.concatenate([np.flatnonzero(text == _DOT), np.full(1, len(text))])
            yield text, starts, np.minimum(stops, dots[np.searchsorted(dots, file)])


@functools.lru_cache(2)
def _powers(count: int) -> np.ndarray:
    """The first powers of the base and of its inverse, modulo 2**64."""
    factors = np.full((2, count), [[_BASE], [_INVERSE]], np.uint64)
    factors[:, 0] = 1
    return np.cumprod(factors, axis=1)


class ShardNames(MadeNames):
    """`SHARD:PATH` of each image of some shards."""

    def __init__(self, shards: Sequence[str], paths: Sequence[PackedNames]) -> None:
        self._shards, self._paths, self._starts = shards, paths, starts_of(paths)

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        number = bisect.bisect_right(self._starts, index) - 1
        return f"{self._shards[number]}:{self._paths[number][index - self._starts[number]]}"

    def spelled(self) -> Iterator[bytes | memoryview]:
        for shard, paths in zip(self._shards, self._paths, strict=True):
            head = f"{shard}:".encode("utf-8", "surrogateescape")
            yield from (head + path for path in paths.spelled())


class SplitNames(MadeNames):
    """The key of each image of some shards; some have the key of another image in the place of their own.

    Args:
        places: the images that have another one's, rising.
        instead: for each of them, whose.
    """

    def __init__(self, keys: Sequence[KeyNames], places: np.ndarray, instead: np.ndarray) -> None:
        self._keys, self._starts, self._places, self._instead = keys, starts_of(keys), places, instead

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        found = int(np.searchsorted(self._places, index))
        if found < len(self._places) and int(self._places[found]) == index:
            index = int(self._instead[found])
        return self._key(index)

    def spelled(self) -> Iterator[bytes | memoryview]:
        own, at = itertools.chain.from_iterable(keys.spelled() for keys in self._keys), 0
        for place, instead in zip(self._places.tolist(), self._instead.tolist(), strict=True):
            yield from itertools.islice(own, place - at)
            next(own)
            yield self._key(instead).encode("utf-8", "surrogateescape")
            at = place + 1
        yield from own

    def _key(self, index: int) -> str:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._keys[number].name(index - self._starts[number])


def starts_of(parts: Iterable[Sized]) -> tuple[int, ...]:
    """Where each of some sequences starts when they are laid one after the other, and where the last one ends."""
    return tuple(itertools.accumulate(map(len, parts), initial=0))
