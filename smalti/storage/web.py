"""Files of a web server, by ranges that it must keep to."""

import base64
import contextlib
import functools
import http.client
import os
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from smalti.errors import ConfigError, StorageError
from smalti.storage.objects import MissingObjectError, exactly, join, persistently, require_name, shown

_TIMEOUT = 60.0  # seconds without a byte
_HOPS = 6  # requests for one answer: the first, and those that a server sends us on to
_IDLE = 16  # connections that stay open
_PIECE = 1 << 20
_SAFE = "%/~:@!$&'()*+,;=?"  # of an address; all else is spelled with %
_REDIRECTS = (301, 302, 303, 307, 308)


class HttpStore:
    """A web server that answers ranges, by the proxy of the environment if there is one.

    Connections stay open and serve one request after the other; each process has its own. A user and password in the
    address are sent to its own host alone.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._idle: list[tuple[tuple[str, ...], http.client.HTTPConnection]] = []
        self._reset()

    @property
    def place(self) -> str:
        return shown(self._place)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        end = self.size(name) if stop is None else stop
        if end <= start:
            return exactly(b"", start, end, self.place, name)
        return persistently(functools.partial(self._range, name, start, end), self.place, name)

    def size(self, name: str) -> int:
        return self._head(name)[0]

    def version(self, name: str) -> str:
        size, etag, changed = self._head(name)
        return "-".join(str(mark) for mark in (size, etag, changed) if mark)

    def names(self) -> list[str]:
        raise ConfigError(
            f"{self.place}: a web server cannot be listed; name the files, such as train-{{000000..000099}}.tar"
        )

    def _range(self, name: str, start: int, stop: int) -> bytes:
        with self._open(name, f"bytes={start}-{stop - 1}") as answer:
            if answer.status != 206:
                raise _RangesIgnoredError
            told = answer.headers.get("Content-Range", "")
            # Past the end a server shortens the range, and says so.
            if not told.startswith(f"bytes {start}-{stop - 1}/"):
                if told.startswith(f"bytes {start}-"):
                    raise MissingObjectError(
                        f"{self.place}: {name!r} ends before byte {stop:,}: the server answered {told!r}"
                    )
                raise ConnectionError(f"asked for bytes {start}-{stop - 1}, the server answered {told!r}")
            # By pieces: memory grows with what has come, and not with what a server says will come.
            pieces, missing = [], stop - start
            while missing and (piece := answer.read(min(missing, _PIECE))):
                pieces.append(piece)
                missing -= len(piece)
            if missing:
                raise ConnectionError(f"the answer ended after {stop - start - missing:,} of {stop - start:,} bytes")
            return exactly(b"".join([*pieces, answer.read(1)]), start, stop, self.place, name)

    def _head(self, name: str) -> tuple[int, str, str]:
        def ask() -> tuple[int, str, str]:
            with self._open(name, "bytes=0-0", or_empty=True) as answer:
                headers = answer.headers
                if answer.status == 200:
                    raise _RangesIgnoredError
                answer.read(_PIECE)
                total = headers.get("Content-Range", "").rpartition("/")[2]
                if not total.isdecimal() or len(total) > 18:
                    raise ConnectionError(f"the server does not tell the size: {headers.get('Content-Range')!r}")
                return int(total), headers.get("ETag", ""), headers.get("Last-Modified", "")

        return persistently(ask, self.place, name)

    @contextlib.contextmanager
    def _open(self, name: str, wanted: str, *, or_empty: bool = False) -> Iterator[http.client.HTTPResponse]:
        """The answer: 206, 200 where ranges are ignored, or with `or_empty` the 416 of a file without a byte."""
        require_name(name)
        address = first = join(self._place, urllib.parse.quote(name))
        for _ in range(_HOPS):
            with self._ask(address, wanted, _origin(address) == _origin(first)) as answer:
                if answer.status in _REDIRECTS:
                    answer.read(_PIECE)
                    address = self._onward(address, answer.headers.get("Location", ""))
                    continue
                if not (answer.status == 416 and or_empty and answer.headers.get("Content-Range") == "bytes */0"):
                    self._refuse(answer, name)
                yield answer
                return
        raise StorageError(f"{self.place}: {name!r}: the server sends from one address to the next without end")

    def _refuse(self, answer: http.client.HTTPResponse, name: str) -> None:
        status = answer.status
        if status not in (200, 206):
            answer.read(_PIECE)  # an answer that is read to its end leaves its connection usable
        else:
            packed = answer.headers.get("Content-Encoding", "identity")
            if packed != "identity":
                raise StorageError(
                    f"{self.place}: {name!r}: the server packs what it sends ({packed[:40]!r}) though it was asked not "
                    "to, so places in it mean nothing; turn that off for these files"
                )
            return
        if status in (404, 410):
            raise FileNotFoundError(2, "no such file")
        if status == 416:
            raise MissingObjectError(f"{self.place}: {name!r} ends before the range asked for")
        if status in (401, 403):
            raise PermissionError(13, f"the server answered {status} {answer.reason}")
        raise ConnectionError(f"the server answered {status} {answer.reason}")

    def _onward(self, address: str, location: str) -> str:
        target = urllib.parse.urljoin(address, location)
        schemes = urllib.parse.urlsplit(address).scheme, urllib.parse.urlsplit(target).scheme
        if not location or schemes not in (("http", "http"), ("http", "https"), ("https", "https")):
            raise StorageError(
                f"{self.place}: the server sends from {schemes[0]} on to {schemes[1] or 'nowhere'!r}, which is refused"
            )
        return target

    @contextlib.contextmanager
    def _ask(self, address: str, wanted: str, trusted: bool) -> Iterator[http.client.HTTPResponse]:
        """One request. Its connection is kept if the answer was read to its end."""
        parts = urllib.parse.urlsplit(address)
        headers = {"Range": wanted, "Accept-Encoding": "identity", "User-Agent": "smalti"}
        if trusted and parts.username:
            headers["Authorization"] = _basic(parts)
        connection, answer = self._answered(parts, headers)
        try:
            yield answer
        finally:
            if answer.isclosed() and connection.sock is not None:
                self._keep(_origin(address), connection)
            else:
                answer.close()
                connection.close()

    def _answered(
        self, parts: urllib.parse.SplitResult, headers: dict[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        origin = _origin(parts.geturl())
        while True:
            connection, target, more = _connection(parts)
            kept = self._kept(origin)
            connection = kept or connection
            try:
                connection.request("GET", target, headers=headers | more)
                return connection, connection.getresponse()
            except BaseException as error:
                connection.close()
                # A server closes what has been silent for long; that says nothing about a new connection.
                if not (kept and isinstance(error, ConnectionError | http.client.HTTPException)):
                    raise

    def _kept(self, origin: tuple[str, ...]) -> http.client.HTTPConnection | None:
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            for place, (of, connection) in enumerate(self._idle):
                if of == origin:
                    del self._idle[place]
                    return connection
        return None

    def _keep(self, origin: tuple[str, ...], connection: http.client.HTTPConnection) -> None:
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            self._idle.append((origin, connection))
            surplus = self._idle[:-_IDLE]
            del self._idle[:-_IDLE]
        for _, old in surplus:
            old.close()

    def _reset(self) -> None:
        # After a fork: a connection must not be shared, and the lock may be held by a thread that is not there.
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._close()

    def _close(self) -> None:
        for _, connection in self._idle:
            connection.close()
        self._idle = []

    def __del__(self) -> None:
        self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        return HttpStore, (self._place,)


def _origin(address: str) -> tuple[str, ...]:
    parts = urllib.parse.urlsplit(address)
    return parts.scheme, parts.hostname or "", str(parts.port or "")


def _connection(parts: urllib.parse.SplitResult) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """(a connection that is opened by its first request, what to ask it for, headers for a proxy)."""
    host, port, secure = parts.hostname or "", parts.port, parts.scheme == "https"
    target = urllib.parse.quote(parts.path or "/", safe=_SAFE.replace("?", ""))
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe=_SAFE)
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(host):
        return kind(host, port, timeout=_TIMEOUT), target, {}
    via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    who = {"Proxy-Authorization": _basic(via)} if via.username else {}
    connection = kind(via.hostname or "", via.port or 80, timeout=_TIMEOUT)
    if secure:
        connection.set_tunnel(host, port or 443, headers=who)
        return connection, target, {}
    netloc = parts.netloc.rpartition("@")[2]
    return connection, f"http://{netloc}{target}", who


def _basic(parts: urllib.parse.SplitResult) -> str:
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


class _RangesIgnoredError(ValueError):
    def __str__(self) -> str:
        return "the server ignores ranges and would send the whole file each time; copy the files to another store"
