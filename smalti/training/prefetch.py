"""Batches made ahead by worker processes, in order, bit for bit as one process would make them.

A batch is a pure function of its step, so nothing needs to be shared: worker w makes steps w, w + workers, ... and
hands each over through a pipe of its own, where it waits until it is wanted. Not torch's DataLoader, for three
reasons: there a killed worker raises inside whatever the training process happens to do, batches lie in /dev/shm, which
containers keep small, and no one can tell at which step a worker died.
"""

import atexit
import contextlib
import ctypes
import fcntl
import io
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from smalti.errors import SmaltiError

T = TypeVar("T")

_PIPE_BYTES = 1 << 20  # as much as Linux lets any user have
_HEAD = np.dtype("<i8")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerDiedError(SmaltiError):
    """A process that loads data was killed or ended without a word."""

    exit_code = 71


def prefetched(
    load: Callable[[int], T],
    first: int,
    last: int,
    *,
    workers: int,
    pin: bool = False,
    describe: Callable[[int], str] | None = None,
) -> "Prefetched[T]":
    """`load(first)`, ..., `load(last - 1)`, in order, made by worker processes while the caller uses earlier ones.

    Args:
        load: a pure function of the step; what it returns is picklable, its tensors on the CPU. It runs in forked
            processes where there are forks (Linux), and must be picklable elsewhere.
        workers: processes; 0 = the calling one makes each batch when it is asked for. Each holds one batch ready.
        pin: tensors in page-locked memory, from which a GPU copies while it computes.
        describe: what a step is made of, for the message about a worker that died on it.

    Raises:
        ValueError: a negative number of workers, or `last` below `first`.

    While iterating:
        WorkerDiedError: a worker was killed; the message names the step and what `describe` says.
        Exception: what `load` raised, of the same class and with the same message.
    """
    if workers < 0 or last < first:
        raise ValueError(f"{workers} workers for steps {first} to {last}")
    return Prefetched(load, first, last, min(workers, last - first), pin, describe, _START_METHOD)


_START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class Prefetched(Generic[T]):
    """An iterator in a `with` block, at whose end the workers are gone; see `prefetched`."""

    def __init__(
        self,
        load: Callable[[int], T],
        first: int,
        last: int,
        workers: int,
        pin: bool,
        describe: Callable[[int], str] | None,
        start_method: str,
    ) -> None:
        self._load, self._first, self._step, self._last = load, first, first, last
        self._pin, self._describe = pin, describe
        self._workers: list[_Worker] = []
        atexit.register(self.close)  # multiprocessing would wait for its children, whom SIGTERM does not end
        try:
            for number in range(workers):
                steps = range(first + number, last, workers)
                self._workers.append(_Worker(load, steps, start_method, [w.pipe for w in self._workers]))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> "Iterator[T]":
        return self

    def __next__(self) -> T:
        if self._step >= self._last:
            self.close()
            raise StopIteration
        step = self._step
        if self._workers:
            made: T = self._receive(step)
        else:
            made = self._load(step)
            if self._pin:
                made = _copied_to_pinned(made)
        self._step += 1
        return made

    def __enter__(self) -> "Prefetched[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once; they only read."""
        atexit.unregister(self.close)
        self._last = self._step
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _receive(self, step: int) -> Any:
        worker = self._workers[(step - self._first) % len(self._workers)]
        try:
            failed, made = worker.receive(self._pin)
        except EOFError:
            how = worker.epitaph()
            self.close()
            # Only now: to describe a step may need what the dead worker stumbled over.
            what = f" ({self._describe(step)})" if self._describe else ""
            raise WorkerDiedError(
                f"a process that loads data {how} while it made step {step}{what}; what was trained is safe: start the "
                f"same command again, with fewer data.workers if memory ran out"
            ) from None
        if failed:
            self.close()
            raise made
        return made


class _Worker:
    """One process and the end of its pipe that is read."""

    def __init__(self, load: Callable[[int], Any], steps: range, start_method: str, others: list[Connection]) -> None:
        context = multiprocessing.get_context(start_method)
        self.pipe, theirs = context.Pipe(duplex=False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with contextlib.suppress(OSError):  # a user with many pipes gets smaller ones
                fcntl.fcntl(self.pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        inherited = [*others, self.pipe] if start_method == "fork" else []
        self.process = context.Process(  # type: ignore[attr-defined]
            target=_work, args=(load, steps, theirs, inherited, os.getpid()), daemon=True, name="smalti-data"
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads. The child takes no lock that a thread of ours could hold.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            self.process.start()
        theirs.close()

    def receive(self, pin: bool) -> tuple[bool, Any]:
        """(whether it is an error, the object).

        Raises:
            EOFError: the worker is gone.
        """
        head = np.empty(3, _HEAD)
        self._fill(head)
        failed, meta_bytes, count = map(int, head)
        sizes = np.empty(count, _HEAD)
        self._fill(sizes)
        meta = np.empty(meta_bytes, np.uint8)
        self._fill(meta)
        buffers = [_empty(int(size), pin) for size in sizes]
        for buffer in buffers:
            self._fill(buffer)
        # Our own bytes, made a moment ago by a child of this process.
        return bool(failed), ForkingPickler.loads(meta.data, buffers=buffers)

    def _fill(self, into: np.ndarray) -> None:
        rest = into.data.cast("B") if into.size else memoryview(b"")
        while rest:
            # The end of the pipe tells of a death, unless some other child inherited its other end.
            ready = wait([self.pipe, self.process.sentinel])
            if self.pipe not in ready and not wait([self.pipe], timeout=0):
                raise EOFError
            count = os.readv(self.pipe.fileno(), [rest])
            if not count:
                raise EOFError
            rest = rest[count:]

    def epitaph(self) -> str:
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None:
            return "fell silent"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _end_with(parent: int) -> None:
    """Have the kernel end this process with the one that it works for, where it can.

    A broken pipe would tell as well, but only at the next batch; until then the sockets inherited from a killed process
    stay open, and the other processes of the run do not hear that it is gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was already gone
            os._exit(1)


def _work(load: Callable[[int], Any], steps: range, pipe: Connection, inherited: list[Connection], parent: int) -> None:
    # The parent decides when to stop; a signal to the whole group (Ctrl-C, a scheduler's notice) is for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with(parent)
    for connection in inherited:
        connection.close()
    torch.set_num_threads(1)
    for step in steps:
        buffers: list[Any] = []
        try:
            meta, failed = _pickled(load(step), buffers), False
        except Exception as error:  # noqa: BLE001 (raised again where the batch was wanted)
            buffers = []
            meta, failed = _pickled(_portable(error), buffers), True
        try:
            _send(pipe.fileno(), meta, buffers, failed)
        except BrokenPipeError:  # nobody wants it any more
            return
        if failed:
            return


def _portable(error: Exception) -> Exception:
    """The error as it can cross a pipe: itself, with where it came from unless it is one that users can mend."""
    if not isinstance(error, SmaltiError):
        error.add_note("in a process that loads data:\n" + "".join(traceback.format_exception(error)))
    error.__cause__ = error.__context__ = error.__traceback__ = None
    try:
        ForkingPickler.loads(_pickled(error, []))
    except Exception:  # noqa: BLE001 (whatever its class does when it is made again)
        kind = SmaltiError if isinstance(error, SmaltiError) else RuntimeError
        plain = kind(f"{error}" if kind is SmaltiError else f"{type(error).__name__}: {error}")
        if isinstance(error, SmaltiError):
            plain.exit_code = error.exit_code  # type: ignore[union-attr]
        for note in getattr(error, "__notes__", ()):
            plain.add_note(note)
        return plain
    return error


def _send(pipe: int, meta: bytes, buffers: list[Any], failed: bool) -> None:
    raw = [buffer.raw() for buffer in buffers]
    head = np.array([failed, len(meta), len(raw), *(len(part) for part in raw)], _HEAD)
    for piece in (memoryview(head.tobytes()), memoryview(meta), *raw):
        rest = piece
        while rest:
            rest = rest[os.write(pipe, rest) :]


def _pickled(made: Any, buffers: list[Any]) -> bytes:
    """The object without its tensors and arrays, which are added to `buffers`."""
    out = io.BytesIO()
    _Pickler(out, 5, True, buffers.append).dump(made)
    return out.getvalue()


class _Pickler(ForkingPickler):
    def reducer_override(self, made: Any) -> Any:
        if isinstance(made, Tensor):
            plain = made.detach().contiguous()
            return _tensor, (plain.flatten().view(torch.uint8).numpy(), plain.dtype, tuple(plain.shape))
        return NotImplemented


def _tensor(memory: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(memory).view(dtype).reshape(shape)


def _empty(size: int, pin: bool) -> np.ndarray:
    memory: np.ndarray = torch.empty(size, dtype=torch.uint8, pin_memory=pin).numpy()
    return memory


def _copied_to_pinned(made: T) -> T:
    buffers: list[Any] = []
    meta = _pickled(made, buffers)
    pinned = []
    for buffer in buffers:
        memory = _empty(len(buffer.raw()), pin=True)
        memory[:] = np.frombuffer(buffer.raw(), np.uint8)
        pinned.append(memory)
    copied: T = ForkingPickler.loads(meta, buffers=pinned)
    return copied
