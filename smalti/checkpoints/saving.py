"""One save as one of its processes sees it: what it writes, and how it says that it cannot."""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.checkpoints.layout import GROUP, name_of
from smalti.checkpoints.shards import Groups, Piece, own_parts, row_count
from smalti.storage.filesystem import FileSystem, storage_errors, write_file
from smalti.storage.tensors import file_pieces, file_size, refuse_non_finite
from smalti.world import World

_OVERHEAD = 4096  # bytes of the small files beside the tensors
_PER_TENSOR = 200  # bytes of the index


@dataclass(frozen=True)
class Saving:
    """What this process writes of one checkpoint.

    Args:
        step: training step.
        parts: rows by group and name.
        files: of each group that has rows here.
        state: the state file; empty where it is not the first process.
        score: None unless it is finite.
        needed: bytes that all of it takes.
        fs: the file operations.
        folder: of the store.
    """

    step: int
    parts: dict[str, dict[str, Piece]]
    files: dict[str, str]
    state: bytes
    score: float | None
    needed: int
    fs: FileSystem
    folder: Path

    @classmethod
    def of(
        cls,
        step: int,
        groups: Groups,
        state: Mapping[str, Any],
        score: float | None,
        world: World,
        fs: FileSystem,
        folder: Path,
    ) -> "Saving":
        """From the arguments of `CheckpointStore.save`, which says what is raised."""
        if not 0 <= step < 10**10:
            raise ValueError(f"step {step} is outside 0 .. 9,999,999,999")
        if bad := [group for group in groups if not GROUP.fullmatch(group)]:
            raise ValueError(f"group name {bad[0]!r}: use small letters, digits and underscores")
        parts = own_parts(groups, world.rank)
        needed, files = 0, {}
        for group, pieces in parts.items():
            rows = {name: piece.rows for name, piece in pieces.items()}
            refuse_non_finite(rows, f"checkpoint {name_of(step)}, group {group!r}")
            if any(row_count(tensor.shape) for tensor in rows.values()):
                suffix = f".rank-{world.rank:04d}" if world.size > 1 else ""
                files[group] = f"{group}{suffix}.safetensors"
            needed += file_size(rows) + _PER_TENSOR * len(rows)
        text = (json.dumps(dict(state), indent=1) + "\n").encode() if world.rank == 0 else b""
        finite = None if score is None or not math.isfinite(score) else float(score)
        return cls(step, parts, files, text, finite, needed + len(text) + _OVERHEAD, fs, folder)

    def write_own(self, temporary: Path) -> dict[str, Any]:
        """Write this process's files into the folder that all share; what they must be when they are read."""
        records = {}
        with self.room_errors(self.needed):
            for group, name in self.files.items():
                rows = {tensor: piece.rows for tensor, piece in self.parts[group].items()}
                records[name] = write_file(self.fs, temporary / name, file_pieces(rows))._asdict()
        return records

    def room_errors(self, needed: int) -> contextlib.AbstractContextManager[None]:
        """Errors of the disk before the checkpoint is stored."""
        advice = "Checkpoints stored before are untouched; make room and run again"
        return storage_errors(self.fs, self.folder, needed, f"storing checkpoint {name_of(self.step)}", advice)

    def tidy_errors(self, needed: int) -> contextlib.AbstractContextManager[None]:
        """Those after."""
        advice = f"Checkpoint {name_of(self.step)} itself is stored; what failed is the tidying after it"
        return storage_errors(self.fs, self.folder, needed, f"tidying up after {name_of(self.step)}", advice)
