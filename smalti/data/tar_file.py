"""The members of a tar file, read once from front to back and believed in nothing.

Python's own reader takes a file that was cut off for one that is complete, as soon as the cut lies between two members.
Here a file ends with its two blocks of zeros or it is an error; nothing is ever written, whatever a member is called.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from smalti.errors import DataError
from smalti.storage.objects import ByteStore

BLOCK = 512
_CHUNK = 1 << 23
_MAX_HEADER_BYTES = 1 << 20  # of a long name or a pax header
_MAX_MEMBER_BYTES = 1 << 29
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "pipe",
    b"7": "contiguous file",
    b"S": "sparse file",
    b"M": "file that goes on in another volume",
}


_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\3\4": "zip",
}


class DamagedTarError(DataError):
    """A tar file is cut off or damaged, or none."""


@dataclass(frozen=True)
class Member:
    """One entry of a tar file.

    Attributes:
        path: without a leading `./`; spelled as `os.fsdecode` does.
        offset: of its first byte in the tar file.
        data: None where `refused` says why it is not to be used.
        refused: or "".
    """

    path: str
    offset: int
    size: int
    data: bytes | None
    refused: str = ""

    @property
    def crc(self) -> int:
        """CRC-32 of its data."""
        return zlib.crc32(self.data or b"")


def walk_members(store: ByteStore, name: str) -> Iterator[Member]:
    """All files of a tar file in order, with their data; folders are passed over.

    Raises:
        DamagedTarError: it is cut off, or one of its heads is damaged, or more follows after its end.
        DataError, StorageError: it cannot be read.
    """
    stream = _Stream(store, name)
    renamed: str | None = None
    resized: int | None = None
    sparse = False
    while True:
        head = stream.read(BLOCK, "the head of a member")
        if head == bytes(BLOCK):
            break
        kind, size = _check_head(head, stream)
        if kind in (b"L", b"K", b"x", b"g"):
            if size > _MAX_HEADER_BYTES:
                raise stream.damaged(f"a name or header of {size:,} bytes")
            content = stream.read(size, "a long name")
            stream.skip_padding(size)
            if kind == b"L":
                renamed = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind in (b"x", b"g"):
                records = _pax(content, stream)
                if kind == b"g" and records.keys() & {"path", "size"}:
                    raise stream.damaged("a header that renames all members")
                renamed = records.get("path", renamed)
                sparse |= any(record.startswith("GNU.sparse") for record in records)
                if "size" in records:
                    digits = records["size"]
                    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
                        raise stream.damaged(f"a size of {digits[:20]!r}")
                    resized = int(records["size"])
            continue
        path = (renamed if renamed is not None else _name(head)).removeprefix("./")
        # Links, devices, folders and pipes have no data, whatever their head says.
        size = 0 if kind in b"123456" else size if resized is None else resized
        offset = stream.offset
        refused = _refusal(path, b"S" if sparse else kind, size)
        renamed, resized, sparse = None, None, False
        if refused or kind == b"5":
            stream.skip(size, path)
            data = None
        else:
            data = stream.read(size, repr(path))
        stream.skip_padding(size)
        if kind != b"5" and not (kind in (b"0", b"\0") and path.endswith("/")):
            yield Member(path, offset, size, data, refused)
    if stream.read(BLOCK, "its second block of zeros") != bytes(BLOCK):
        raise stream.damaged("a single block of zeros")
    stream.require_only_zeros()


def _refusal(path: str, kind: bytes, size: int) -> str:
    """Why a member is not used; "" where it may be."""
    if path.startswith("/"):
        return "absolute name"
    if ".." in path.split("/"):
        return "name that leads outside"
    if "\0" in path or not path:
        return "name that no file can have"
    if kind not in (b"0", b"\0", b"5"):
        return f"{_KINDS.get(kind, f'member of the unknown kind {kind!r}')}, not a file"
    if size > _MAX_MEMBER_BYTES:
        return f"{size} bytes; more than {_MAX_MEMBER_BYTES >> 20} MiB is refused"
    return ""


class _Stream:
    """The bytes of a tar file in order, fetched in large pieces."""

    def __init__(self, store: ByteStore, name: str) -> None:
        self._store, self._name, self.offset = store, name, 0
        self._size = store.size(name)
        self._piece, self._start = b"", 0
        head = store.read(name, 0, min(8, self._size))
        if packed := next((kind for magic, kind in _PACKED.items() if head.startswith(magic)), ""):
            raise self.damaged(f"it is packed with {packed}; unpack it")
        if self._size % BLOCK:
            raise self.damaged(f"{self._size:,} bytes, no multiple of {BLOCK}: it was cut off")

    def damaged(self, what: str) -> DamagedTarError:
        return DamagedTarError(
            f"{self._store.place}: {self._name!r} is no whole tar file: {what} (at byte {self.offset:,}); copy or make "
            f"it again"
        )

    def read(self, count: int, what: str) -> bytes:
        self._require(count, what)
        pieces = []
        while count:
            if not self._start <= self.offset < self._start + len(self._piece):
                self._start = self.offset
                self._piece = self._store.read(self._name, self._start, min(self._size, self._start + _CHUNK))
            part = self._piece[self.offset - self._start : self.offset - self._start + count]
            pieces.append(part)
            self.offset += len(part)
            count -= len(part)
        return b"".join(pieces)

    def skip(self, count: int, what: str) -> None:
        self._require(count, what)
        self.offset += count

    def skip_padding(self, size: int) -> None:
        self.skip(-size % BLOCK, "the padding of a member")

    def require_only_zeros(self) -> None:
        while self.offset < self._size:
            count = min(_CHUNK, self._size - self.offset)
            if self.read(count, "its end").count(0) != count:
                raise self.damaged("more follows after its end, as when two are joined")

    def _require(self, count: int, what: str) -> None:
        if self.offset + count > self._size:
            raise self.damaged(f"cut off inside {what}: {self.offset + count - self._size:,} bytes are missing")


def _check_head(head: bytes, stream: _Stream) -> tuple[bytes, int]:
    """(kind, size) of a member whose head is as it was written."""
    stored = head[148:156].strip(b" \0")
    total = sum(head) - sum(head[148:156]) + 8 * 32
    if not stored or not all(byte in b"01234567" for byte in stored) or int(stored, 8) != total:
        raise stream.damaged("the checksum of a member's head does not fit")
    field = head[124:136]
    if field[0] == 0x80:
        return head[156:157], int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not all(byte in b"01234567" for byte in digits):
        raise stream.damaged(f"a size of {field!r}")
    return head[156:157], int(digits or b"0", 8)


def _name(head: bytes) -> str:
    name = head[:100].partition(b"\0")[0]
    prefix = head[345:500].partition(b"\0")[0]
    if head[257:263] == b"ustar\0" and prefix:
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _pax(content: bytes, stream: _Stream) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of an extended header."""
    records, at = {}, 0
    while at < len(content):
        space = content.find(b" ", at, at + 20)
        digits = content[at:space] if space > at else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(content) or content[end - 1 : end] != b"\n" or not equals:
            raise stream.damaged("an extended header that makes no sense")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records
