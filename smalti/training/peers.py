"""Who of the processes of a run is missing, when one of them is: signs of life beside the training."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch

from smalti.errors import PeerLostError, PreemptedError, SmaltiError
from smalti.world import World

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

BEAT = 0.5  # seconds between two signs of life, where steps take longer
LOOK = 3 * BEAT  # how long to look for one
_PAUSE = 0.02  # between two signs of quick steps
_PATIENCE = timedelta(seconds=3)  # for the store itself, which may be gone with the process that kept it
_MUTE = 2.5  # seconds that the training has to notice by itself that process 0 is gone
_GO_ON = "What was stored stands: the same command continues the run"
# What torch says when another process is gone; its classes do not cover gloo, which has plain RuntimeErrors.
_COLLECTIVE = ("gloo", "connection", "nccl", "processgroup", "timed out", "socket", "tcpstore")


class _Sign(NamedTuple):
    step: int
    beats: int


class Peers:
    """Tells the others, for a `with` block, that this process lives and at which step it is; and why it left.

    A thread writes the signs, so that they stop when the process is killed or stopped, and go on while it waits for
    another one. A process that is stuck in its own computation still gives them; then its step tells.
    """

    def __init__(self, world: World) -> None:
        self.world, self.step = world, 0
        self._keeper = 0  # the step of process 0, which may keep the store itself
        self._store: Store | None = None
        self._thread: threading.Thread | None = None
        self._news = threading.Event()
        self._noticed = threading.Event()  # the training is over, or has begun to say why it ends
        self._ended = False

    def __enter__(self) -> "Peers":
        if self.world.store is not None:
            # A connection of its own: the other one may be waiting.
            self._store = self.world.store.clone()  # type: ignore[attr-defined]
            self._store.set_timeout(_PATIENCE)
            self._thread = threading.Thread(target=self._beat, name="signs of life", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        self._news.set()
        if self._thread is not None:
            self._thread.join()

    def advance(self, step: int) -> None:
        """This process has finished a step."""
        self.step = step
        self._news.set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What ends the body is told to the others; and if that is the end of another one, it is told who.

        Raises:
            PeerLostError: another process ended, or did not answer in time.
        """
        try:
            try:
                yield
            finally:
                self._noticed.set()
        except PreemptedError:
            raise
        except (RuntimeError, PeerLostError) as error:
            if self.world.size == 1 or not _is_collective(error):
                self._leave(f"{type(error).__name__}: {error}")
                raise
            raise PeerLostError(f"{self.blame()}. {_GO_ON}") from error
        except SmaltiError as error:
            self._leave(str(error))
            raise
        except BaseException as error:
            self._leave(f"{type(error).__name__}: {error}".strip(": "))
            raise

    def blame(self) -> str:
        """Who is missing, since when, and why if it has said so; takes a moment."""
        me = self.world
        head = self._head()
        try:
            before = self._signs()
            time.sleep(LOOK)
            after = self._signs()
            notes = [self._note(rank) for rank in range(me.size)]
        except (RuntimeError, OSError):  # torch.distributed.DistError among them
            return self._keeper_is_gone()
        others = [rank for rank in range(me.size) if rank != me.rank]
        causes = [f"process {rank} ended: {notes[rank]}" for rank in others if notes[rank]]
        lost = [
            f"process {rank} was last heard of at step {after[rank].step}"
            for rank in others
            if not notes[rank] and before[rank] == after[rank]
        ]
        behind = [f"process {rank} is at step {after[rank].step}" for rank in others]
        return f"{head}: {'; '.join(causes or lost or ['no other process is missing', *behind])}"

    def _beat(self) -> None:
        beats = 0
        while not self._ended:
            self._news.clear()
            beats += 1
            try:
                self._set(f"sign/{self.world.rank}", f"{self.step} {beats}")
                self._keeper = self._sign(0).step
            except RuntimeError as error:  # the store is gone, and the run with it; the training itself will say so
                if isinstance(error, torch.distributed.DistNetworkError):  # and not only slow
                    self._end_if_mute()
                return
            time.sleep(_PAUSE)
            self._news.wait(BEAT)

    def _end_if_mute(self) -> None:
        """End this process if process 0 is gone and the training does not notice.

        Gloo now and then misses that a connection was closed, and would wait as long as for one that only hangs; nobody
        can interrupt it. A checkpoint that is half written is one of a dead writer, as after a kill.
        """
        if _agent_keeps_store() or self._noticed.wait(_MUTE):
            return
        sys.stderr.write(f"smalti: {self._keeper_is_gone()}. {_GO_ON}\n")
        sys.stderr.flush()
        os._exit(PeerLostError.exit_code)

    def _head(self) -> str:
        return f"process {self.world.rank} of {self.world.size} stopped at step {self.step}"

    def _keeper_is_gone(self) -> str:
        keeper = "torchrun" if _agent_keeps_store() else "process 0"
        return f"{self._head()}: {keeper} is gone, and process 0 was last heard of at step {self._keeper}"

    def _signs(self) -> list[_Sign]:
        return [self._sign(rank) for rank in range(self.world.size)]

    def _sign(self, rank: int) -> _Sign:
        return _Sign(*map(int, (self._get(f"sign/{rank}") or "0 0").split()))

    def _note(self, rank: int) -> str:
        return self._get(f"left/{rank}")

    def _leave(self, reason: str) -> None:
        if self._store is None:
            return
        try:
            self._set(f"left/{self.world.rank}", f"{' '.join(reason.split())[:500]} (at step {self.step})")
        except RuntimeError:  # nobody there to be told; the reason itself is on its way to the user
            return

    def _set(self, key: str, value: str) -> None:
        assert self._store is not None
        self._store.set(key, value)

    def _get(self, key: str) -> str:
        if self._store is None or not self._store.check([key]):
            return ""
        return self._store.get(key).decode()


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_collective(error: Exception) -> bool:
    if isinstance(error, (PeerLostError, torch.distributed.DistError)):
        return True
    return any(word in str(error).lower() for word in _COLLECTIVE)
