"""Files of a web server, by ranges that it must keep to."""

import contextlib
import functools
import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from smalti.errors import ConfigError
from smalti.storage.objects import MissingObjectError, exactly, join, persistently, require_name, shown

_TIMEOUT = 60.0  # seconds without a byte


class HttpStore:
    """A web server that answers ranges; one connection a request, by the proxy of the environment if there is one."""

    def __init__(self, place: str) -> None:
        self._place = place

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
        with self._open(name, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
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
            data = answer.read(stop - start + 1)
            if len(data) < stop - start:
                raise ConnectionError(f"the answer ended after {len(data):,} of {stop - start:,} bytes")
            return exactly(data, start, stop, self.place, name)

    def _head(self, name: str) -> tuple[int, str, str]:
        def ask() -> tuple[int, str, str]:
            with self._open(name, {"Range": "bytes=0-0"}) as answer:
                headers = answer.headers
                if answer.status != 206:
                    raise _RangesIgnoredError
                total = headers.get("Content-Range", "").rpartition("/")[2]
                if not total.isdigit():
                    raise ConnectionError(f"the server does not tell the size: {headers.get('Content-Range')!r}")
                return int(total), headers.get("ETag", ""), headers.get("Last-Modified", "")

        return persistently(ask, self.place, name)

    @contextlib.contextmanager
    def _open(self, name: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        require_name(name)
        request = urllib.request.Request(  # noqa: S310 (http and https only, see `open_store`)
            join(self._place, urllib.parse.quote(name)), headers={"Accept-Encoding": "identity", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310
                yield answer
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(2, "no such file") from error
            if error.code == 416:
                raise MissingObjectError(f"{self.place}: {name!r} ends before the range asked for") from error
            if error.code in (401, 403):
                raise PermissionError(13, f"the server answered {error.code} {error.reason}") from error
            raise ConnectionError(f"the server answered {error.code} {error.reason}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return HttpStore, (self._place,)


class _RangesIgnoredError(ValueError):
    def __str__(self) -> str:
        return "the server ignores ranges and would send the whole file each time; copy the files to another store"
