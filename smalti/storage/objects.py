"""Bytes by name and range, from a folder of this machine or from any store that fsspec knows.

A place is a folder, or a URL of one: `s3://bucket/folder`, `gs://`, `file://`, `memory://`, `https://`. What is read is
exactly what was asked for, or an error: stores that are short, that ignore ranges or that fail for a moment exist.
`https://` is spoken in `smalti.storage.web`, because fsspec leaves it to the server whether a range is a range.
"""

import os
import stat
import threading
import time
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from smalti.errors import ConfigError, DataError, StorageError

TRIES = 3
PAUSES = (0.2, 1.0)  # seconds before the second and the third try
_OPEN_FILES = 64
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError)

T = TypeVar("T")


class MissingObjectError(DataError):
    """A file of a store is not there, or ends before the range that was asked for."""


@runtime_checkable
class ByteStore(Protocol):
    """Files of one place, by their names below it with `/` between the parts. May be used from several threads, carried
    over a fork, and pickled.
    """

    @property
    def place(self) -> str:
        """The folder or URL, for messages; without what could be a password."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` up to `stop` (None = the end): exactly so many.

        Raises:
            MissingObjectError: there is no such file, or it ends before `stop`.
            StorageError: the store cannot be reached, after several tries.
        """
        ...

    def size(self, name: str) -> int:
        """In bytes; errors as for `read`."""
        ...

    def version(self, name: str) -> str:
        """Differs when the file was written again, as far as the store tells: size, time, etag. Errors as `read`."""
        ...

    def names(self) -> list[str]:
        """All files in the place and below, sorted.

        Raises:
            ConfigError: such a place cannot be listed: https.
            DataError: there is no such place.
            StorageError: the store cannot be reached.
        """
        ...


def is_url(place: str | Path) -> bool:
    """Whether this is a URL, such as `s3://bucket/folder`, and not a path."""
    scheme, mark, _ = str(place).partition("://")
    return bool(mark) and scheme[:1].isalpha() and scheme.replace("+", "").replace("-", "").replace(".", "").isalnum()


def open_store(place: str | Path) -> ByteStore:
    """The files of a place; nothing is looked at yet.

    Raises:
        ConfigError: nothing is known of such URLs, or the package that reads them is not installed.
    """
    if not is_url(place):
        return LocalStore(Path(place))
    scheme = str(place).partition("://")[0].lower()
    if scheme == "file":
        return LocalStore(Path(urllib.request.url2pathname(urllib.parse.urlsplit(str(place)).path)))
    if scheme in ("http", "https"):
        from smalti.storage.web import HttpStore  # it stands on this module

        return HttpStore(str(place))
    return FsspecStore(str(place))


def join(place: str | Path, name: str) -> str:
    """A file's or folder's place below another one."""
    head, mark, query = str(place).partition("?") if is_url(place) else (str(place), "", "")
    return f"{head.rstrip('/')}/{name}{mark}{query}"


class LocalStore:
    """A folder of this machine. Files are kept open for a while: a shard is read in thousands of small ranges."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._reset()

    @property
    def place(self) -> str:
        return str(self.folder)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        require_name(name)
        try:
            opened = self._opened(name)
            end = os.fstat(opened.descriptor).st_size if stop is None else stop
            pieces, at = [], start
            while at < end and (piece := os.pread(opened.descriptor, end - at, at)):
                pieces.append(piece)
                at += len(piece)
        except OSError as error:
            raise _translated(error, self.place, name) from error
        return exactly(b"".join(pieces), start, end, self.place, name)

    def size(self, name: str) -> int:
        return self._stat(name).st_size

    def version(self, name: str) -> str:
        status = self._stat(name)
        return f"{status.st_size}-{status.st_mtime_ns}"

    def names(self) -> list[str]:
        if not self.folder.is_dir():
            raise DataError(f"{self.place}: no such folder")
        found = []
        for folder, _, files in os.walk(self.folder, onerror=self._refuse):
            below = Path(folder).relative_to(self.folder).as_posix()
            for file in files:
                if os.path.isfile(os.path.join(folder, file)):
                    found.append(file if below == "." else f"{below}/{file}")
        return sorted(found)

    def _refuse(self, error: OSError) -> None:
        raise StorageError(f"{error.filename}: folder cannot be read: {error.strerror}") from error

    def _stat(self, name: str) -> os.stat_result:
        require_name(name)
        try:
            status = os.stat(self.folder / name)
        except OSError as error:
            raise _translated(error, self.place, name) from error
        if not stat.S_ISREG(status.st_mode):
            raise MissingObjectError(f"{self.place}: {name!r} is not a file")
        return status

    def _opened(self, name: str) -> "_OpenFile":
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            opened = self._files.pop(name, None) or _OpenFile(self.folder / name)
            self._files[name] = opened
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return opened

    def _reset(self) -> None:
        # After a fork: the lock may be held by a thread that this process does not have.
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.folder,)


class _OpenFile:
    """Closed when nobody holds it any more, so that one thread may drop what another still reads."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        # O_NONBLOCK: a pipe in the place of a file must not stop the reader for ever.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise FileNotFoundError(2, "not a file", str(path))

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class FsspecStore:
    """What fsspec reads. Its own objects hold threads and connections, so each process makes its own."""

    def __init__(self, place: str) -> None:
        self._place, self._pid = place.rstrip("/"), -1
        self._lock = threading.Lock()
        self._connect()

    @property
    def place(self) -> str:
        return shown(self._place)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        path = self._path(name)
        end = self.size(name) if stop is None else stop
        if end <= start:
            return exactly(b"", start, end, self.place, name)
        data = self._try(name, lambda fs: fs.cat_file(path, start=start, end=end))
        return exactly(bytes(data), start, end, self.place, name)

    def size(self, name: str) -> int:
        return int(self._info(name)["size"])

    def version(self, name: str) -> str:
        info = self._info(name)
        marks = [info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "created")]
        return "-".join(str(mark) for mark in (info["size"], *marks) if mark is not None)

    def names(self) -> list[str]:
        found = self._try("", lambda fs: fs.find(self._root))
        if not found:
            raise DataError(f"{self.place}: no such place, or nothing in it")
        root = self._root.rstrip("/") + "/"
        return sorted(path[len(root) :] for path in map(str, found) if path.startswith(root))

    def _info(self, name: str) -> dict[str, Any]:
        path = self._path(name)

        def info(fs: Any) -> dict[str, Any]:
            fs.invalidate_cache()  # a listing from before must not speak for the file as it is now
            found: dict[str, Any] = fs.info(path)
            return found

        found = self._try(name, info)
        if found.get("type") != "file" or found.get("size") is None:
            raise MissingObjectError(f"{self.place}: {name!r} is not a file")
        return found

    def _path(self, name: str) -> str:
        require_name(name)
        return f"{self._root.rstrip('/')}/{name}"

    def _connect(self) -> Any:
        if self._pid != os.getpid():
            if self._pid != -1:
                self._lock = threading.Lock()
            with self._lock:
                self._fs, self._root = file_system(self._place)
                self._pid = os.getpid()
        return self._fs

    def _try(self, name: str, ask: Callable[[Any], T]) -> T:
        return persistently(lambda: ask(self._connect()), self.place, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return FsspecStore, (self._place,)


def file_system(place: str) -> tuple[Any, str]:
    """What fsspec has for a URL, and the path of the place in it; each call makes its own.

    Raises:
        ConfigError: nothing is known of such URLs, or the package that reads them is not installed.
    """
    from fsspec.core import url_to_fs

    scheme = place.partition("://")[0].lower()
    try:
        fs, root = url_to_fs(place, skip_instance_cache=True)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        what = f"install {package} (`pip install {package}`)" if package else f"{error}"
        raise ConfigError(f"{shown(place)}: {scheme}:// needs another package: {what}") from error
    except ValueError as error:
        known = "a path, or a URL that begins with s3://, gs://, https:// or file://"
        raise ConfigError(f"{shown(place)}: {error}; expected {known}") from error
    return fs, str(root)


def persistently(ask: Callable[[], T], place: str, name: str) -> T:
    """Ask, and ask again after failures that may pass.

    Raises:
        MissingObjectError: there is no such file.
        StorageError: every try failed.
    """
    for pause in (*PAUSES, None):
        try:
            return ask()
        except (DataError, ConfigError, StorageError):
            raise
        except _FINAL as error:
            raise _translated(error, place, name) from error
        except Exception as error:  # every store has errors of its own; what they mean is not known here
            if pause is None:
                raise StorageError(
                    f"{place}: {name or 'the list of files'!r} cannot be read, {TRIES} tries failed: {_reason(error)}"
                ) from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def _translated(error: Exception, place: str, name: str) -> DataError | StorageError:
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return MissingObjectError(f"{place}: there is no file {name!r}" if name else f"{place}: no such place")
    return StorageError(f"{place}: {name or 'the list of files'!r} cannot be read: {_reason(error)}")


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error)
    return " ".join(f"{text}".split()) or type(error).__name__


def exactly(data: bytes, start: int, stop: int, place: str, name: str) -> bytes:
    """The bytes, if they are as many as were asked for.

    Raises:
        MissingObjectError: fewer.
        StorageError: more.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"bytes {start} to {stop} are no range")
    if len(data) < stop - start:
        raise MissingObjectError(
            f"{place}: {name!r} ends {stop - start - len(data):,} bytes before byte {stop:,}: it was cut or replaced"
        )
    if len(data) > stop - start:
        raise StorageError(f"{place}: {name!r} gave {len(data):,} bytes where {stop - start:,} were asked for")
    return data


def require_name(name: str) -> None:
    """Refuse names that lead out of a store.

    Raises:
        DataError: it does.
    """
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"{name!r} is no name of a file in a store: it must stay inside, without '..' and empty parts")


def shown(place: str) -> str:
    """A URL without user, password and query, which may be secret."""
    parts = urllib.parse.urlsplit(place)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
