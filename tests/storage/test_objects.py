"""Ranges of files from every kind of store: exactly what was asked for, or an error that says what is wrong."""

import http.server
import multiprocessing
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from smalti.errors import ConfigError, DataError, StorageError
from smalti.storage import objects
from smalti.storage import web as web_module
from smalti.storage.objects import MissingObjectError, is_url, join, open_store

FILES = {"a.bin": bytes(range(256)) * 40, "deep/er/b.bin": b"0123456789", "deep/empty": b"", "odd name%.bin": b"odd"}


class Server(http.server.BaseHTTPRequestHandler):
    """A web server of `FILES` that can misbehave; `behaviour` is one of the words below."""

    behaviour, etag, changed = "good", '"abc"', ""
    asked = 0
    heads: tuple = ()

    def do_GET(self):
        type(self).asked += 1
        type(self).heads += ({"path": self.path, **self.headers},)
        name = objects.urllib.parse.unquote(objects.urllib.parse.urlsplit(self.path).path).removeprefix("/data/")
        if self.behaviour == "busy" or (self.behaviour == "busy once" and self.asked == 1):
            return self.send_error(503)
        if self.behaviour == "forbidden":
            return self.send_error(403)
        if self.behaviour == "gone":
            return self.send_error(410)
        if name not in FILES:
            return self.send_error(404)
        data = FILES[name]
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.behaviour == "no ranges" or not match:
            return self.answer(200, data)
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= len(data):
            return self.send_error(416)
        if self.behaviour == "another range":
            start, stop = start + 1, stop + 1
        told = f"bytes {start}-{stop - 1}/{len(data)}"
        if self.behaviour == "lies about the range":
            return self.answer(206, data[:5], told)
        if self.behaviour == "sends more":
            return self.answer(206, data[start : stop + 3], told)
        if self.behaviour == "cut":
            return self.answer(206, data[start:stop], told, cut=True)
        return self.answer(206, data[start:stop], told)

    def answer(self, status, body, content_range=None, cut=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.etag)
        self.send_header("Last-Modified", self.changed)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body[:-1] if cut else body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(objects, "PAUSES", (0.0, 0.0))


@pytest.fixture
def web():
    class Mine(Server):
        pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    Mine.place = f"http://127.0.0.1:{server.server_port}/data"
    yield Mine
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["folder", "file", "memory", "http"])
def place(request, tmp_path):
    match request.param:
        case "folder" | "file":
            for name, data in FILES.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(data)
            yield str(tmp_path) if request.param == "folder" else f"file://{tmp_path}"
        case "memory":
            fs = fsspec.filesystem("memory")
            for name, data in FILES.items():
                fs.pipe(f"/stored/{name}", data)
            yield "memory://stored"
            fs.rm("/stored", recursive=True)
        case "http":
            yield request.getfixturevalue("web").place


def test_ranges_are_exact_in_every_store(place):
    store = open_store(place)
    data = FILES["a.bin"]
    for start, stop in ((0, 1), (0, len(data)), (7, 1000), (len(data) - 1, len(data)), (5, 5)):
        assert store.read("a.bin", start, stop) == data[start:stop]
    assert store.read("a.bin") == data
    assert store.read("a.bin", 10_000) == data[10_000:]
    assert store.read("odd name%.bin") == b"odd"
    assert store.read("deep/er/b.bin", 3, 6) == b"345"
    assert store.size("a.bin") == len(data)


def test_all_files_are_listed_where_the_place_can_be(place):
    store = open_store(place)
    if place.startswith("http"):
        with pytest.raises(ConfigError, match="cannot be listed; name the files"):
            store.names()
    else:
        assert store.names() == sorted(FILES)
        with pytest.raises(DataError, match="no such"):
            open_store(join(place, "nowhere")).names()


def test_what_is_missing_or_too_short_is_named(place):
    store = open_store(place)
    for read in (lambda: store.read("none.bin", 0, 4), lambda: store.read("none.bin"), lambda: store.size("none.bin")):
        with pytest.raises(MissingObjectError, match=r"no file 'none.bin'") as caught:
            read()
        assert "\n" not in str(caught.value)
    for start, stop in ((5, 11), (10, 11), (500, 600)):
        with pytest.raises(MissingObjectError, match=r"'deep/er/b.bin' ends"):
            store.read("deep/er/b.bin", start, stop)
    with pytest.raises(DataError):
        store.size("deep")


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "deep/../../x", "", "deep//b", "./a.bin", "a\0b"])
def test_names_that_lead_outside_are_refused(place, name):
    store = open_store(place)
    for ask in (store.read, store.size, store.version):
        with pytest.raises(DataError, match="no name of a file in a store"):
            ask(name)


def test_a_place_below_keeps_the_query_of_a_url():
    assert join("https://host/data?key=1", "a/b.tar") == "https://host/data/a/b.tar?key=1"
    assert join("data/", "a") == "data/a"
    assert join("s3://bucket", "a") == "s3://bucket/a"


def test_urls_are_told_from_paths(tmp_path):
    assert all(is_url(place) for place in ("s3://a/b", "HTTPS://x", "memory://", "gs://b"))
    assert not any(is_url(place) for place in ("/a/b", "a", tmp_path, "a:/b", "C:\\data", "odd/s3://x", "://x"))


def test_a_missing_package_and_an_unknown_kind_of_place_are_one_line():
    with pytest.raises(ConfigError, match=r"abfs:// needs another package: install adlfs") as caught:
        open_store("abfs://user:secret@container/data?token=secret")
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="unheard://x"):
        open_store("unheard://x")


def test_stores_work_in_threads_in_forks_and_when_pickled(place):
    store = open_store(place)
    data = FILES["a.bin"]
    assert store.read("a.bin", 0, 10) == data[:10]

    def check(i):
        assert store.read("a.bin", i, i + 50) == data[i : i + 50]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(200)))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for i in range(50):
                check(i)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pickler = multiprocessing.reduction.ForkingPickler
    again = pickler.loads(pickler.dumps(store))
    assert again.read("a.bin", 3, 9) == data[3:9]
    assert again.place == store.place


@pytest.mark.faults
def test_a_fork_while_a_thread_is_at_it_does_not_wait_for_that_thread(place):
    store = open_store(place)
    store.read("a.bin", 0, 1)
    store._lock.acquire()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            code = int(store.read("a.bin", 3, 9) != FILES["a.bin"][3:9])
        finally:
            os._exit(code)
    store._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_versions_tell_that_a_file_was_written_again(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    (tmp_path / "x").write_bytes(b"one")
    first = store.version("x")
    assert store.version("x") == first
    os.utime(tmp_path / "x", ns=(0, 0))
    second = store.version("x")
    assert second != first
    (tmp_path / "x").write_bytes(b"longer")
    os.utime(tmp_path / "x", ns=(0, 0))
    assert store.version("x") != second
    fs = fsspec.filesystem("memory")
    fs.pipe("/versions/x", b"one")
    there = open_store("memory://versions")
    first = there.version("x")
    fs.pipe("/versions/x", b"longer")
    assert there.version("x") != first
    assert there.size("x") == 6
    second = there.version("x")
    fs.pipe("/versions/x", b"LONGER")
    assert there.version("x") != second
    asked = []
    monkeypatch.setattr(type(there._connect()), "invalidate_cache", lambda self, path=None: asked.append(path))
    there.size("x")
    assert asked, "an old listing must not speak for the new file"


@pytest.mark.parametrize("mark", ["etag", "changed"])
def test_versions_of_a_web_server_are_what_it_says_of_the_file(web, mark):
    store = open_store(web.place)
    first = store.version("a.bin")
    assert store.version("a.bin") == first
    setattr(web, mark, "another")
    assert store.version("a.bin") != first


# A folder of this machine


def test_more_files_than_stay_open_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_OPEN_FILES", 3)
    for i in range(20):
        (tmp_path / f"{i}").write_bytes(bytes([i]))
    store = open_store(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [store.read(f"{i % 20}", 0, 1)[0] for i in range(60)] == list(range(20)) * 3
    assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    store = open_store(tmp_path)
    for name in ("pipe", "folder"):
        with pytest.raises(MissingObjectError):
            store.read(name, 0, 1)
        with pytest.raises(MissingObjectError):
            store.size(name)
    assert store.names() == []


def test_a_folder_that_may_not_be_read_is_an_error_and_not_an_empty_one(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(StorageError, match="folder cannot be read: Permission denied"):
        open_store(tmp_path).names()


# A web server


@pytest.mark.faults
@pytest.mark.parametrize("name", ["a.bin", "deep/er/b.bin"])
def test_a_server_that_ignores_ranges_is_refused_and_never_believed(web, name):
    web.behaviour = "no ranges"
    store = open_store(web.place)
    for start, stop in ((0, 3), (3, 6), (0, len(FILES[name]))):
        with pytest.raises(StorageError, match="ignores ranges"):
            store.read(name, start, stop)
    with pytest.raises(StorageError, match="ignores ranges"):
        store.size(name)


@pytest.mark.faults
@pytest.mark.parametrize("behaviour", ["another range", "lies about the range", "cut", "busy", "forbidden"])
def test_a_server_that_answers_wrongly_is_an_error_after_three_tries(web, behaviour):
    web.behaviour = behaviour
    with pytest.raises((StorageError, MissingObjectError)) as caught:
        open_store(web.place).read("a.bin", 10, 20)
    assert "\n" not in str(caught.value)
    assert web.asked == (1 if behaviour == "forbidden" else 3)


@pytest.mark.faults
def test_a_server_that_sends_more_than_it_was_asked_for_is_not_believed(web):
    web.behaviour = "sends more"
    with pytest.raises(StorageError, match="gave 11 bytes where 10 were asked for"):
        open_store(web.place).read("a.bin", 10, 20)


@pytest.mark.faults
def test_a_file_that_a_server_has_removed_is_missing(web):
    web.behaviour = "gone"
    with pytest.raises(MissingObjectError, match=r"no file 'a.bin'"):
        open_store(web.place).read("a.bin", 10, 20)


@pytest.mark.faults
def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(web_module, "_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = open_store(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"'a.bin' cannot be read, 3 tries failed: .*timed out"):
            store.read("a.bin", 0, 1)


@pytest.mark.faults
def test_nothing_is_asked_for_in_the_open_that_was_asked_for_in_secret():
    store = open_store("https://host/data")
    assert store._onward("https://host/data/a", "/b") == "https://host/b"
    assert store._onward("http://host/data/a", "https://host/b") == "https://host/b"
    with pytest.raises(StorageError, match="sends from https on to 'http', which is refused"):
        store._onward("https://host/data/a", "http://host/data/a")


def test_only_so_many_connections_stay_open(monkeypatch):
    monkeypatch.setattr(web_module, "_IDLE", 2)
    closed = []

    class Connection:
        def __init__(self, number):
            self.number = number

        def close(self):
            closed.append(self.number)

    store = open_store("http://host/data")
    for number in range(5):
        store._keep(("http", "host", ""), Connection(number))
    assert closed == [0, 1, 2]
    assert store._kept(("http", "elsewhere", "")) is None


def test_a_proxy_of_the_environment_is_asked_for_the_whole_address(web, monkeypatch):
    monkeypatch.setenv("http_proxy", web.place.replace("http://", "http://me:secret@"))
    monkeypatch.setenv("no_proxy", "")
    assert open_store("http://far.example/data?key=1").read("a.bin", 10, 20) == FILES["a.bin"][10:20]
    assert web.heads[0]["path"] == "http://far.example/data/a.bin?key=1"
    assert web.heads[0]["Proxy-Authorization"] == "Basic bWU6c2VjcmV0"


def test_a_failure_that_passes_is_tried_again(web):
    web.behaviour = "busy once"
    assert open_store(web.place).read("a.bin", 10, 20) == FILES["a.bin"][10:20]
    assert web.asked == 2


def test_a_server_that_is_not_there_is_an_error_without_the_secrets_of_its_address(web):
    store = open_store("http://user:hidden@127.0.0.1:9/data?key=hidden")
    with pytest.raises(
        StorageError, match=r"http://127.0.0.1:9/data: 'a.bin' cannot be read, 3 tries failed"
    ) as caught:
        store.read("a.bin", 0, 1)
    assert "hidden" not in str(caught.value)


def test_a_store_that_gives_more_than_was_asked_for_is_not_believed(monkeypatch):
    fsspec.filesystem("memory").pipe("/generous/x", b"0123456789")
    store = open_store("memory://generous")
    monkeypatch.setattr(type(store._connect()), "cat_file", lambda self, path, start=None, end=None: b"0123456789")
    with pytest.raises(StorageError, match="gave 10 bytes where 3 were asked for"):
        store.read("x", 2, 5)
