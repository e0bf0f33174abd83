"""The `.npz` format itself: written as a stream, and read without trusting what the file says of itself."""

import contextlib
import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from smalti.errors import DataError
from smalti.storage.filesystem import Buffer

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip archive can name: equal arrays, equal bytes
PIECE = 1 << 22
_DEFLATE_LIMIT = 1032  # no deflated byte can stand for more; what claims to is made to fill a memory
_HEADER_BYTES = 10_000
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    SyntaxError,
    RecursionError,
    tokenize.TokenError,
    NotImplementedError,
    RuntimeError,
    OSError,
)

Member = tuple[str, tuple[int, ...], str, Iterable[np.ndarray]]


def archive_of(members: Iterable[Member]) -> Iterator[Buffer]:
    """The bytes of an uncompressed `.npz`, piece by piece; a pure function of the arrays.

    Args:
        members: (key, shape, numpy's name of the type, pieces whose values follow one another) of each array.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name, shape, dtype, pieces in members:
            info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            info.create_system = 3
            # zip64 for every member, as numpy does: whether one is needed must not change the layout.
            with archive.open(info, "w", force_zip64=True) as member:
                header = io.BytesIO()
                np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
                member.write(header.getvalue())
                for piece in pieces:
                    if piece.size:
                        member.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                    yield from sink.taken()
    yield from sink.taken()


class _Sink:
    """What `zipfile` takes for a stream that cannot seek; hands on what was written without a copy."""

    def __init__(self) -> None:
        self._waiting: list[Buffer] = []

    def write(self, data: Any) -> int:
        self._waiting.append(data)
        return len(data)

    def flush(self) -> None: ...

    def taken(self) -> list[Buffer]:
        taken, self._waiting = self._waiting, []
        return taken


@dataclass(frozen=True)
class ArrayHeader:
    """What an array in a `.npz` is, known to agree with the bytes that are there.

    Attributes:
        start: bytes before the values, inside the array's own file.
        is_stored: not compressed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    start: int
    is_stored: bool

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class NpzFile:
    """A `.npz` whose claims are checked before anything is made room for, and of which nothing is ever executed.

    Raises:
        DataError: the file is missing, no zip archive, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: no such file; give an .npz file")
        with self.readable(), path.open("rb") as opened:
            if not zipfile.is_zipfile(opened):
                raise DataError(f"{path} is no .npz file (a zip archive of arrays); write it with numpy.savez")
            self._bytes = path.stat().st_size
            with zipfile.ZipFile(opened) as archive:
                self._members = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if not i.is_dir()}

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._members)

    def header(self, key: str) -> ArrayHeader:
        """
        Raises:
            DataError: there is no such key, or its claims do not fit the bytes that are there.
        """
        self._require(key)
        info = self._members[key]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{self.path}: {key} is compressed in a way that numpy does not use; save it anew")
        is_stored = info.compress_type == zipfile.ZIP_STORED
        possible = info.compress_size if is_stored else info.compress_size * _DEFLATE_LIMIT
        if info.header_offset + info.compress_size > self._bytes or info.file_size > possible:
            raise DataError(
                f"{self.path}: {key} claims {info.file_size:,} bytes, more than its {info.compress_size:,} stored "
                "bytes can hold; the file is damaged or was made to fill your memory"
            )
        with self.readable(), zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
            shape, fortran_order, dtype = _read_header(member)
            found = ArrayHeader(shape, dtype, fortran_order, member.tell(), is_stored)
        if dtype.hasobject:
            raise DataError(f"{self.path}: {key} holds pickled Python objects, which are never read; save plain arrays")
        if min(shape, default=0) < 0 or found.start + found.bytes != info.file_size:
            raise DataError(
                f"{self.path}: {key} claims to be {found}, {found.bytes:,} bytes, and has "
                f"{info.file_size - found.start:,}; the file is damaged"
            )
        return found

    def read(self, key: str, *, limit: int) -> np.ndarray:
        """A whole array.

        Args:
            limit: bytes that it may have.

        Raises:
            DataError: it is larger, missing or damaged.
        """
        header = self.header(key)
        if header.bytes > limit:
            raise DataError(f"{self.path}: {key} is {header}, {header.bytes:,} bytes, and at most {limit:,} make sense")
        values = bytearray()
        for piece in self.stream(key):
            values += piece
        array = np.frombuffer(values, dtype=header.dtype)
        return array.reshape(header.shape, order="F" if header.fortran_order else "C")

    def stream(self, key: str) -> Iterator[bytes]:
        """The bytes of the values from first to last; damage shows at the latest at the end, by the checksum.

        Raises:
            DataError: the array is missing or damaged.
        """
        header = self.header(key)
        with self.readable(), self.opened(key, header) as member:
            while piece := member.read(PIECE):
                yield piece

    @contextlib.contextmanager
    def opened(self, key: str, header: ArrayHeader) -> Iterator[IO[bytes]]:
        """The array as a file that stands at its first value."""
        with contextlib.ExitStack() as stack:
            with self.readable():
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                member = stack.enter_context(archive.open(self._members[key]))
                member.read(header.start)
            yield member

    def offset(self, key: str, header: ArrayHeader) -> int:
        """Where the values of an array that is stored uncompressed begin in the `.npz` itself."""
        at = self._members[key].header_offset
        with self.readable(), self.path.open("rb") as file:
            file.seek(at)
            local = file.read(30)  # it is one: `header` has opened the array by it
            # Its name and extra field may differ in length from those in the archive's directory.
            return (
                at + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little") + header.start
            )

    def _require(self, key: str) -> None:
        if key not in self._members:
            have = ", ".join(sorted(self.keys)) or "none"
            raise DataError(f"{self.path} has no array {key!r}; its keys are: {have}")

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Whatever damaged bytes make a decoder raise becomes one line."""
        try:
            yield
        except DataError:
            raise
        except _DAMAGE as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{self.path} is damaged or cannot be read ({reason}); copy it again") from error


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member, max_header_size=_HEADER_BYTES)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member, max_header_size=_HEADER_BYTES)
    raise ValueError(f"an array of format version {version}, which only structured arrays need")
