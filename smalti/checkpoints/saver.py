"""Saving while training goes on: a copy of the state at once, the slow rest beside the next steps."""

import datetime
import threading
import time
from collections.abc import Mapping
from copy import deepcopy
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smalti.checkpoints.shards import Groups, Piece
from smalti.checkpoints.store import CheckpointStore

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Key = tuple[str, str]


class AsyncSaver:
    """Saves to a store in one thread of its own, for a `with` block, whose end waits for the last one.

    Until a save is done, the one before it stands; a process that is killed meanwhile loses nothing stored. Takes as
    much host memory as one checkpoint has on this process.

    Args:
        store: nobody else saves to it meanwhile. With several processes, all make their saver at the same place,
            because it sets up a process group of its own: its messages never meet those of the training.
        timeout: seconds after which a process that neither answers nor has ended is given up.

    Attributes:
        blocking_seconds: for how long the last `save` kept the training from going on: waiting for the save before it,
            and copying, also where it was the GPU that copied.
        seconds: how long the last save that is done took in all.
    """

    def __init__(self, store: CheckpointStore, *, timeout: float = 1800) -> None:
        self.store = store
        self.blocking_seconds = self.seconds = 0.0
        self._group: ProcessGroup | None = None
        if store.world.size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[_Key, Tensor] = {}

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._join()
        failed, self._error = self._error, None
        self._buffers.clear()
        if failed is not None and error is not None:
            error.add_note(f"and the last checkpoint was not stored: {failed}")
        elif failed is not None:
            raise failed

    def save(self, step: int, groups: Groups, state: Mapping[str, Any], *, score: float | None = None) -> None:
        """Take a copy of the state and begin to store it. Arguments as of `CheckpointStore.save`.

        Raises:
            Exception: the save before this one failed, as `check` would have told.
        """
        begin = time.perf_counter()
        self._join()
        self.check()
        copied, events = self._snapshot(groups)
        self.blocking_seconds = time.perf_counter() - begin
        self._thread = threading.Thread(
            target=self._run, args=(begin, events, step, copied, deepcopy(dict(state)), score), name="checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raise, once, what the last save failed with; at once, without waiting for one that is under way.

        Processes may learn of a failure some steps apart. Let them agree on `failed` before one of them leaves the
        others alone.
        """
        if (error := self._error) is not None:
            self._error = None
            raise error

    @property
    def failed(self) -> bool:
        """Whether `check` would raise."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when everything given to `save` is stored.

        Raises:
            Exception: it could not be.
        """
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(
        self,
        begin: float,
        events: "list[torch.cuda.Event]",
        step: int,
        groups: Groups,
        state: Mapping[str, Any],
        score: float | None,
    ) -> None:
        try:
            if events:
                events[1].synchronize()
                self.blocking_seconds = max(self.blocking_seconds, events[0].elapsed_time(events[1]) / 1000)
            self.store.save(step, groups, state, score=score, group=self._group)
        except BaseException as error:  # noqa: BLE001  (raised again by whoever asks next)
            self._error = error
        else:
            self.seconds = time.perf_counter() - begin

    def _snapshot(self, groups: Groups) -> "tuple[dict[str, dict[str, Tensor | Piece]], list[torch.cuda.Event]]":
        """A copy in host memory of what this process writes, and on a GPU the begin and end of copying.

        The GPU copies in the order of its stream: what training does next waits for it, and the host for nothing.
        """
        result: dict[str, dict[str, Tensor | Piece]] = {}
        used: dict[_Key, Tensor] = {}
        events: list[torch.cuda.Event] = []
        for group, members in groups.items():
            result[group] = {}
            for name, value in members.items():
                if not isinstance(value, Piece) and self.store.world.rank > 0:
                    continue
                rows = (value.rows if isinstance(value, Piece) else value).detach()
                if rows.is_cuda and not events:
                    events.append(_mark(rows.device))
                copy = used[group, name] = self._buffer((group, name), rows)
                copy.copy_(rows, non_blocking=rows.is_cuda)
                result[group][name] = Piece(copy, value.shape, value.start) if isinstance(value, Piece) else copy
                if rows.is_cuda:
                    device = rows.device
        self._buffers = used  # those of tensors that are gone are freed
        return result, [*events, _mark(device)] if events else []

    def _buffer(self, key: _Key, rows: Tensor) -> Tensor:
        """Host memory for a tensor, the same as last time if it fits; pinned, if a GPU is to write to it."""
        old = self._buffers.get(key)
        if old is not None and (old.shape, old.dtype) == (rows.shape, rows.dtype):
            return old
        return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)


def _mark(device: torch.device) -> "torch.cuda.Event":
    """Where the stream of a GPU stands; a process has one GPU."""
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))
