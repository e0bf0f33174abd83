"""Tensors that several processes hold in parts: what each writes, what all of it makes, and reading any rows back.

Every process writes its rows into files of its own; the manifest says of each tensor which rows stand in which file.
Rows can so be read by any number of processes, however many wrote them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smalti.checkpoints.patience import patiently
from smalti.errors import CheckpointError
from smalti.storage.tensors import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a tensor that this process holds and is to write.

    Args:
        rows: a slice of the tensor along its first dimension, maybe of no rows, on any device.
        shape: of the whole tensor.
        start: the first of the rows. A tensor without dimensions has one row, and one process gives it.

    Raises:
        ValueError: such rows are not of such a tensor.
    """

    rows: Tensor
    shape: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        fits = tuple(self.rows.shape[1:]) == tuple(self.shape[1:]) and self.rows.ndim == len(self.shape)
        if not fits or self.start < 0 or self.start + row_count(self.rows.shape) > row_count(self.shape):
            raise ValueError(
                f"rows of shape {list(self.rows.shape)} from {self.start} are no slice of a tensor {list(self.shape)}"
            )


Groups = Mapping[str, Mapping[str, Tensor | Piece]]


class Slice(NamedTuple):
    """Where some rows of a tensor are stored."""

    file: str
    start: int
    rows: int


class Entry(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


Index = dict[str, dict[str, Entry]]  # group, name


def row_count(shape: Sequence[int]) -> int:
    """Rows along the first dimension; a tensor without dimensions is one row."""
    return shape[0] if len(shape) else 1


def own_parts(groups: Groups, rank: int) -> dict[str, dict[str, Piece]]:
    """What the process of this rank writes; whole tensors are the first one's."""
    return {
        group: {
            name: value if isinstance(value, Piece) else Piece(value, tuple(value.shape), 0)
            for name, value in members.items()
            if rank == 0 or isinstance(value, Piece)
        }
        for group, members in groups.items()
    }


def index_of(parts: Mapping[str, Mapping[str, Piece]], files: Mapping[str, str]) -> dict[str, Any]:
    """The same as JSON, with the file that each group's rows stand in; pieces without rows are named without one."""
    return {
        group: {
            name: [
                DTYPE_NAMES[piece.rows.dtype],
                list(piece.shape),
                [[files[group], piece.start, row_count(piece.rows.shape)]] if row_count(piece.rows.shape) else [],
            ]
            for name, piece in members.items()
        }
        for group, members in parts.items()
    }


def merge(indices: Sequence[Mapping[str, Any]]) -> Index:
    """The index of a checkpoint from those of its writers.

    Raises:
        ValueError: they contradict each other, or their rows leave a gap or overlap.
    """
    result: Index = {}
    for rank, index in enumerate(indices):
        for group, members in parse_index(index).items():
            known = result.setdefault(group, {})
            for name, entry in members.items():
                old = known.get(name, Entry(entry.dtype, entry.shape, ()))
                if (old.dtype, old.shape) != (entry.dtype, entry.shape):
                    raise ValueError(
                        f"process {rank} has {group}.{name} as {entry.dtype} {list(entry.shape)}, another one as "
                        f"{old.dtype} {list(old.shape)}"
                    )
                known[name] = Entry(entry.dtype, entry.shape, (*old.slices, *entry.slices))
    for group, members in result.items():
        for name, entry in members.items():
            members[name] = entry._replace(slices=tuple(sorted(entry.slices, key=lambda part: part.start)))
            if gap := untiled(members[name]):
                raise ValueError(f"the processes' rows do not make up {group}.{name} {list(entry.shape)}: {gap}")
    return result


def parse_index(index: Mapping[str, Any]) -> Index:
    """An index from its JSON form.

    Raises:
        ValueError, TypeError, AttributeError: it is none.
    """
    return {
        group: {
            name: Entry(str(dtype), tuple(map(int, shape)), tuple(Slice(str(f), int(a), int(n)) for f, a, n in slices))
            for name, (dtype, shape, slices) in members.items()
        }
        for group, members in index.items()
    }


def untiled(entry: Entry) -> str:
    """Where a tensor's slices leave a gap or overlap; empty if they do neither. They must be in order."""
    at = 0
    for part in entry.slices:
        if part.rows < 1 or part.start != at:
            return f"row {at} is followed by row {part.start} of {part.file}"
        at += part.rows
    rows = row_count(entry.shape)
    return "" if at == rows else f"{at} of {rows} rows are there"


def index_of_files(files: Mapping[str, Path]) -> Index:
    """The index of a checkpoint that keeps a whole group per file, as format version 1 did.

    Args:
        files: the file of each group.
    """
    result: Index = {}
    for group, path in files.items():
        with _opened(path) as file:
            members = result[group] = {}
            for name in file.keys():  # noqa: SIM118  (not a dict)
                view = file.get_slice(name)
                shape = tuple(view.get_shape())
                rows = row_count(shape)
                members[name] = Entry(view.get_dtype(), shape, (Slice(path.name, 0, rows),) if rows else ())
    return result


class StoredCheckpoint:
    """A verified checkpoint. Tensors come from the disk when they are asked for, and are on the CPU.

    Args:
        step: training step.
        state: what `save` was given beside the tensors.
        path: its folder.
        run_id: of the run that wrote it; None if it had none.
        score: what `save` was told; None if nothing, or nothing finite.
        late: another machine has seen it whole, so that a file that is missing here is only late.
    """

    def __init__(
        self,
        step: int,
        state: dict[str, Any],
        path: Path,
        index: Index,
        *,
        run_id: str | None = None,
        score: float | None = None,
        late: bool = False,
    ) -> None:
        self.step, self.state, self.path = step, state, path
        self.run_id, self.score = run_id, score
        self._index = index
        self._late = late
        self._open: dict[str, Any] = {}

    def groups(self) -> list[str]:
        """Names of the groups of tensors."""
        return list(self._index)

    def names(self, group: str) -> list[str]:
        """Names of a group's tensors.

        Raises:
            KeyError: there is no such group.
        """
        return list(self._index[group])

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor.

        Raises:
            KeyError: there is no such tensor.
        """
        return self._index[group][name].shape

    def dtype(self, group: str, name: str) -> torch.dtype:
        """Its dtype.

        Raises:
            KeyError: there is no such tensor.
        """
        return DTYPES[self._index[group][name].dtype]

    def rows(self, group: str, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, read from those files alone that hold some of them.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it has no such rows.
            CheckpointError: a file has changed since it was verified.
        """
        entry = self._index[group][name]
        if not entry.shape:
            raise ValueError(f"{group}.{name} has no dimensions and so no rows: read it whole")
        if not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"rows {start} to {stop} of {group}.{name}, which has {entry.shape[0]}")
        result = torch.empty((stop - start, *entry.shape[1:]), dtype=DTYPES[entry.dtype])
        for part in entry.slices:
            first, last = max(start, part.start), min(stop, part.start + part.rows)
            if first < last:
                view = self._view(part, name, entry)
                result[first - start : last - start] = view[first - part.start : last - part.start]
        return result

    def tensor(self, group: str, name: str) -> Tensor:
        """A whole tensor, in memory of its own. Errors as of `rows`."""
        entry = self._index[group][name]
        if entry.shape:
            return self.rows(group, name, 0, entry.shape[0])
        (part,) = entry.slices
        self._view(part, name, entry)
        return self._file(part.file).get_tensor(name).clone()

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything, by group and name."""
        return {group: {name: self.tensor(group, name) for name in names} for group, names in self._index.items()}

    def _view(self, part: Slice, name: str, entry: Entry) -> Any:
        path = self.path / part.file
        try:
            view = self._file(part.file).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} does not hold {name}, which its manifest places there: {error}") from error
        shape = [part.rows, *entry.shape[1:]] if entry.shape else []
        if view.get_shape() != shape or view.get_dtype() != entry.dtype:
            raise CheckpointError(
                f"{path} has {name} as {view.get_dtype()} {view.get_shape()}, its manifest says {entry.dtype} {shape}"
            )
        return view

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = patiently(lambda: _opened(self.path / name), late=self._late)
        return self._open[name]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
