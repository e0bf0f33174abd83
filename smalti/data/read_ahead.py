"""Neighbours in a file far away, fetched together: one request for many small reads that come soon after one another.

It pays where the order of a run is one of blocks, and one process reads a good share of each. Nobody tells which share
that is, so it is counted: where single reads would have cost less than half, they are made instead.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from smalti.storage.objects import ByteStore, MissingObjectError

HELD_BYTES = 1 << 28
REQUEST_BYTES = 1 << 17  # what a request costs beside its own bytes: 25 ms at 80 MB/s, shared by sixteen at once
_JUDGED_AFTER = 4  # stretches that were let go of


def pays(stretches: int, fetched: int, reads: int, used: int) -> bool:
    """Whether stretches cost at most twice what single reads of what was used of them would.

    Requests count beside bytes: of tiny files in a tar most bytes are heads and padding, and a stretch still pays.

    Args:
        fetched: bytes of all stretches together.
        used: bytes of all reads together.
    """
    return stretches * REQUEST_BYTES + fetched <= 2 * (reads * REQUEST_BYTES + used)


@dataclass
class _Stretch:
    data: bytes
    used: int
    reads: int = 1


class ReadAhead:
    """Stretches of the files of a store, the last ones of up to `HELD_BYTES`. May be shared by threads, carried over a
    fork, and pickled.
    """

    def __init__(self, store: ByteStore) -> None:
        self._store = store
        self._reset()

    def _reset(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._held: OrderedDict[tuple[str, int], _Stretch] = OrderedDict()
        self._let_go = self._fetched = self._reads = self._used = 0  # as `pays` wants them, of stretches let go of

    def read(self, name: str, start: int, stop: int, low: int, high: int) -> bytes:
        """Bytes `start` to `stop` of a file, inside the stretch from `low` to `high` that may be fetched for them.

        Raises:
            MissingObjectError, StorageError: as `ByteStore.read`.
        """
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            held = self._held.get((name, low))
            if held is not None:
                self._held.move_to_end((name, low))
                held.used, held.reads = held.used + stop - start, held.reads + 1
                return held.data[start - low : stop - low]
            alone = self._let_go >= _JUDGED_AFTER and not pays(self._let_go, self._fetched, self._reads, self._used)
        if alone:
            return self._store.read(name, start, stop)
        try:
            data = self._store.read(name, low, high)
        except MissingObjectError:
            # The file was cut. What lies before the cut is as good as it was.
            return self._store.read(name, start, stop)
        with self._lock:
            self._held[name, low] = _Stretch(data, stop - start)
            size = sum(len(stretch.data) for stretch in self._held.values())
            while size > HELD_BYTES and len(self._held) > 1:
                _, oldest = self._held.popitem(last=False)
                size -= len(oldest.data)
                self._let_go, self._fetched = self._let_go + 1, self._fetched + len(oldest.data)
                self._reads, self._used = self._reads + oldest.reads, self._used + oldest.used
        return data[start - low : stop - low]

    def forget(self, name: str, low: int) -> None:
        """Fetch a stretch anew when it is asked for again: what came was not what it should be."""
        with self._lock:
            self._held.pop((name, low), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadAhead, (self._store,)
