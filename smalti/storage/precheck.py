"""Looking at a stranger's file before anything reads it: everything is counted and compared, nothing is interpreted.

Source: the description of safetensors at huggingface.co/docs/safetensors, and PKWARE's APPNOTE for zip archives.
"""

import json
import math
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from smalti.errors import CheckpointError

MAX_FILE = 1 << 36  # bytes; the largest released checkpoint, with optimizer state, has a sixth of this
MAX_HEADER = 1 << 21  # a released network needs a tenth of it; more takes long to read
MAX_TENSORS = 1 << 14
MAX_MEMBERS = 50_000
MAX_PICKLE = 1 << 25

_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
# What torch.save writes; a program (TorchScript) has other members, and so has any other kind of archive.
_MEMBER = re.compile(
    r"(?P<root>[^/]+)/(data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id)"
)


def check_size(path: Path) -> int:
    """The file's size in bytes.

    Raises:
        CheckpointError: it is empty, no plain file, or larger than anything that is read here.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not path.is_file() or not 0 < size <= MAX_FILE:
        raise CheckpointError(f"{path} is no file of 1 to {MAX_FILE:,} bytes: expected released weights")
    return size


def check_safetensors(path: Path) -> int:
    """Look at the header of a safetensors file: sizes, names, types, and that the data has neither holes nor overlaps.

    Returns:
        How many tensors there are.

    Raises:
        CheckpointError: something does not fit.
    """
    size = check_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is no whole safetensors file: its header would have {length:,} bytes, the file has {size:,} "
                f"and {MAX_HEADER:,} are allowed"
            )
        text = file.read(length)
    # Before it is parsed, which takes long for very many; every entry has this word.
    if (entries := text.count(b'"data_offsets"')) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {entries:,} tensors: expected 1 to {MAX_TENSORS:,}")
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: its header is no plain JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no whole safetensors file: its header is no table")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise CheckpointError(f"{path} is no whole safetensors file: its notes are not text")
    if not 1 <= len(header) <= MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(header):,} tensors: expected 1 to {MAX_TENSORS:,}")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise CheckpointError(f"{path}: tensor {name} begins at byte {start}, where {end} was expected")
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(f"{path} has {size - 8 - length:,} bytes of data, its header speaks of {end:,}")
    return len(header)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's bytes are, after everything about it was found to fit."""
    if not name.isprintable() or not 0 < len(name) <= 512:
        raise CheckpointError(f"{path} has a tensor with an unprintable or overlong name: {name[:40]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: the entry of tensor {name} is not of the form that safetensors has")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        raise CheckpointError(f"{path}: tensor {name} has the unknown type {str(dtype)[:40]!r}")
    if not _numbers(shape) or len(shape) > 16 or not _numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name} has a shape or offsets that are not whole numbers from 0 on")
    if offsets[1] - offsets[0] != math.prod(shape) * _WIDTHS[dtype]:
        raise CheckpointError(f"{path}: tensor {name} has {offsets[1] - offsets[0]} bytes, which its shape does not")
    return offsets[0], offsets[1], name


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def check_zip(path: Path) -> None:
    """Look at the archive that `torch.save` makes: members as it names them, none packed, all whole.

    Raises:
        CheckpointError: something does not fit; nothing was unpacked to find out.
    """
    size = check_size(path)
    entries, listing = _promised(path)
    if entries > MAX_MEMBERS or listing > MAX_MEMBERS * 256:
        raise CheckpointError(f"{path} is an archive of {entries:,} members: at most {MAX_MEMBERS:,} are read")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive.infolist(), size)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its member {damaged!r} is another; fetch it again")


def _check_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    names = [member.filename for member in members]
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript program, not weights: load it where you trust it and save its state_dict"
        )
    roots = {match["root"] if (match := _MEMBER.fullmatch(name)) else None for name in names}
    if len(roots) != 1 or None in roots or len(set(names)) != len(names):
        odd = next((name for name in names if not _MEMBER.fullmatch(name)), names[0] if names else "nothing")
        raise CheckpointError(f"{path} is an archive, but none that torch.save writes: it holds {odd[:80]!r}")
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path} is an archive, but none that torch.save writes: it holds no data.pkl")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise CheckpointError(f"{path} is packed, as torch.save never does: {member.filename[:80]!r} may be a bomb")
        if member.flag_bits & 1:
            raise CheckpointError(f"{path} is encrypted: give the plain file")
        if member.filename.endswith("data.pkl") and member.file_size > MAX_PICKLE:
            raise CheckpointError(f"{path}: its list of tensors has {member.file_size:,} bytes, more than any model's")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"{path} speaks of more bytes than it has: its members lie over one another")


def _promised(path: Path) -> tuple[int, int]:
    """How many members the archive's end record speaks of, and how long their listing is."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16) - 128))
        tail = file.read()
    entries = listing = 0
    for mark, layout in ((b"PK\5\6", "<4x4xHHI4x2x"), (b"PK\6\6", "<4x8x2x2x4x4xQQQ8x")):
        at = tail.rfind(mark)
        if at >= 0 and len(tail) - at >= struct.calcsize(layout):
            here, total, length = struct.unpack_from(layout, tail, at)
            # The largest value of the short form only says: see the long one.
            short = mark == b"PK\5\6"
            for count in (here, total):
                entries = max(entries, 0 if short and count == 0xFFFF else count)
            listing = max(listing, 0 if short and length == 0xFFFFFFFF else length)
    return entries, listing
