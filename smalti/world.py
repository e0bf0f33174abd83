"""The processes that `torchrun` started together: who this one is, and how rows come to the first of them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from smalti.errors import PeerLostError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

# Longer than the slowest share of the work may lag behind the fastest; a process that died is noticed at once.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process among those that work on the same thing.

    Args:
        rank: 0 to size - 1; the first one writes and reports.
        local_rank: among those of this machine; None where nobody says.
        store: small notes that all can read, also while one of them does not answer; None = not connected, or alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    store: "Store | None" = field(default=None, compare=False, repr=False)

    @classmethod
    def launched(cls) -> "World":
        """As `torchrun`, or whoever starts processes as it does, describes it; a world of one where nobody does."""
        rank, size, local = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(int(rank or 0), max(1, int(size or 1)), None if local is None else int(local))

    def device(self, device: torch.device) -> torch.device:
        """`cuda` without a number is another GPU for each process of a machine; anything else is what it is."""
        if device.type != "cuda" or device.index is not None or self.local_rank is None:
            return device
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def share(self, count: int, unit: int) -> range:
        """This process's part of `range(count)`: contiguous, in order of rank, cut at multiples of `unit`."""
        units = -(-count // unit)
        first, last = units * self.rank // self.size, units * (self.rank + 1) // self.size
        return range(min(count, first * unit), min(count, last * unit))

    def agree(self, yes: bool) -> bool:
        """What the first process says, on all of them."""
        if self.size == 1:
            return yes
        said = torch.tensor([int(yes)])
        torch.distributed.broadcast(said, 0)
        return bool(said)

    def sum(self, *values: float) -> tuple[float, ...]:
        """Each number added up over all processes, in float64; the same bits on all of them.

        Raises:
            PeerLostError: another process ended before its numbers came.
        """
        if self.size == 1:
            return values
        with self._together():
            total = torch.tensor(values, dtype=torch.float64)
            torch.distributed.all_reduce(total)
        return tuple(total.tolist())

    def gather(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """All processes' rows, in order of rank, on the first process; None on the others.

        Args:
            rows: the same names everywhere, each (rows of this process, width), maybe no rows at all.

        Raises:
            PeerLostError: another process ended before its rows came.
        """
        if self.size == 1:
            return dict(rows)
        with self._together():
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            mine = torch.tensor([len(next(iter(rows.values())))])
            torch.distributed.all_gather(counts, mine)
            found = {name: self._gather_one(part, [int(n) for n in counts]) for name, part in rows.items()}
            torch.distributed.barrier()
        return {name: part for name, part in found.items() if part is not None} if self.rank == 0 else None

    def gather_objects(self, value: Any, group: "ProcessGroup | None" = None) -> list[Any]:
        """Every process's value, in order of rank, on all of them; nobody goes on before all have given theirs.

        Args:
            value: small, of the types that JSON has; what comes back has been through JSON, here too.
            group: a process group of all processes that can move CPU tensors (gloo); None = the default one.

        Raises:
            PeerLostError: another process ended before its value came.
        """
        return [json.loads(part) for part in self._exchange(json.dumps(value).encode(), group, everywhere=True) or []]

    def collect_objects(self, value: Any, group: "ProcessGroup | None" = None) -> list[Any] | None:
        """As `gather_objects`, to the first process alone: for values that grow with the model. None on the others."""
        parts = self._exchange(json.dumps(value).encode(), group, everywhere=False)
        return None if parts is None else [json.loads(part) for part in parts]

    def broadcast_object(self, value: Any, group: "ProcessGroup | None" = None) -> Any:
        """The first process's value on all of them, by the rules of `gather_objects`; the others' is not looked at."""
        data = json.dumps(value).encode() if self.rank == 0 else b""
        if self.size > 1:
            with self._together():
                length = torch.tensor([len(data)])
                torch.distributed.broadcast(length, 0, group=group)
                text = _as_tensor(data, int(length))
                torch.distributed.broadcast(text, 0, group=group)
                data = text.numpy().tobytes()
        return json.loads(data)

    def barrier(self, group: "ProcessGroup | None" = None) -> None:
        """Wait until every process has come here.

        Raises:
            PeerLostError: another process ended before it came.
        """
        self.gather_objects(None, group)

    def after_first(self, do: Callable[[], T], name: str) -> T:
        """What `do` returns, which the others begin when the first process has ended it, well or not.

        For what leaves something on the disk that saves the others the work, however long it takes: nobody's patience
        runs out meanwhile. Where the processes have no store in common, all do it at once.

        Args:
            name: tells this occasion apart from others.

        Raises:
            PeerLostError: the first process ended meanwhile, and the store with it.
        """
        if self.store is None:
            return do()
        if self.rank == 0:
            try:
                return do()
            finally:
                self.store.set(f"first/{name}", "done")
        # A connection of its own: others on this one would wait as well.
        store = self.store.clone()  # type: ignore[attr-defined]
        with self._together():
            store.wait([f"first/{name}"], _PATIENCE)
        return do()

    def _exchange(self, data: bytes, group: "ProcessGroup | None", *, everywhere: bool) -> list[bytes] | None:
        if self.size == 1:
            return [data]
        with self._together():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            torch.distributed.all_gather(lengths, torch.tensor([len(data)]), group=group)
            longest = max(int(length) for length in lengths)
            mine = _as_tensor(data, longest)
            parts = [torch.zeros_like(mine) for _ in lengths] if everywhere or self.rank == 0 else None
            if everywhere:
                torch.distributed.all_gather(parts, mine, group=group)
            else:
                torch.distributed.gather(mine, parts, dst=0, group=group)
        if parts is None:
            return None
        return [part.numpy()[: int(length)].tobytes() for part, length in zip(parts, lengths, strict=True)]

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise PeerLostError(
                f"process {self.rank} of {self.size} waited for another one that ended; its own message says why"
            ) from error

    def _gather_one(self, part: Tensor, counts: list[int]) -> Tensor | None:
        if self.rank:
            if len(part):
                torch.distributed.send(part.contiguous(), 0)
            return None
        whole = part.new_empty(sum(counts), *part.shape[1:])
        whole[: len(part)] = part
        start = len(part)
        for rank, count in enumerate(counts[1:], start=1):
            if count:
                torch.distributed.recv(whole[start : start + count], rank)
            start += count
        return whole


def _as_tensor(data: bytes, length: int) -> Tensor:
    """Bytes as gloo moves them, filled up with zeros. Objects travel as JSON: torch's own way would unpickle them."""
    return (
        torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)
        if length
        else torch.zeros(0, dtype=torch.uint8)
    )


@contextmanager
def world(device: torch.device | None = None, patience: timedelta = _PATIENCE) -> Iterator[World]:
    """`World.launched`, connected; inside another `world()`, that one.

    Args:
        device: what the processes compute on, if its tensors shall go between them too; those on the CPU always can.
        patience: how long a process waits for one that neither answers nor has ended.
    """
    me = World.launched()
    if me.size == 1 or torch.distributed.is_initialized():
        yield me
        return
    backend = "gloo"
    if device is not None and device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(me.device(device))
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=patience))
    groups = PrefixStore("default_pg", store)
    torch.distributed.init_process_group(backend, store=groups, rank=rank, world_size=size, timeout=patience)
    try:
        yield replace(me, store=PrefixStore("smalti", store))
    finally:
        torch.distributed.destroy_process_group()
