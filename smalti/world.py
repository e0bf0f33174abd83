"""The processes that `torchrun` started together: who this one is, and how rows come to the first of them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from smalti.errors import SmaltiError

# Longer than the slowest share of the work may lag behind the fastest; a process that died is noticed at once.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process among those that work on the same thing.

    Args:
        rank: 0 to size - 1; the first one writes and reports.
        local_rank: among those of this machine; None where nobody says.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None

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

    def gather(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """All processes' rows, in order of rank, on the first process; None on the others.

        Args:
            rows: the same names everywhere, each (rows of this process, width), maybe no rows at all.

        Raises:
            SmaltiError: another process ended before its rows came.
        """
        if self.size == 1:
            return dict(rows)
        try:
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            mine = torch.tensor([len(next(iter(rows.values())))])
            torch.distributed.all_gather(counts, mine)
            found = {name: self._gather_one(part, [int(n) for n in counts]) for name, part in rows.items()}
            torch.distributed.barrier()
        except RuntimeError as error:
            raise SmaltiError(
                f"process {self.rank} of {self.size} waited for another one that ended; its own message says why"
            ) from error
        return {name: part for name, part in found.items() if part is not None} if self.rank == 0 else None

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


@contextmanager
def world() -> Iterator[World]:
    """`World.launched`, connected."""
    me = World.launched()
    if me.size == 1:
        yield me
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield me
    finally:
        torch.distributed.destroy_process_group()
