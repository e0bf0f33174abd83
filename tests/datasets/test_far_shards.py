"""Tar shards on a web server: few requests, few connections, the same images, and nothing believed."""

import http.server
import io
import os
import re
import signal
import tarfile
import threading
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from smalti.data import load_batch
from smalti.data import read_ahead as read_ahead_module
from smalti.data import shards as shards_module
from smalti.data.changed import ChangedFileError
from smalti.data.order import SampleOrder, training_order
from smalti.data.shards import load_shards
from smalti.errors import ConfigError, StorageError
from smalti.storage import objects
from smalti.storage.objects import open_store
from smalti.workflows import data_check

COUNT, PETABYTE = 120, 1 << 50


class Server(http.server.BaseHTTPRequestHandler):
    """Ranges of the files of a folder over connections that stay open, counted."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the reader to confirm its head
    folder, behaviour, requests, connections = None, "good", 0, 0

    def setup(self):
        super().setup()
        type(self).connections += 1

    def do_GET(self):
        kind = type(self)
        kind.requests += 1
        kind.heads.append(dict(self.headers))
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if self.behaviour == "sends on" and path.startswith("/first/"):
            self.answer(302, b"", Location=f"{self.elsewhere}/data/{path.removeprefix('/first/')}")
        elif self.behaviour in ("in circles", "to a file", "down"):
            target = {"in circles": self.path, "to a file": "file:///etc/passwd", "down": "ftp://x/y"}[self.behaviour]
            self.answer(302, b"", Location=target)
        else:
            self.serve(path)

    def serve(self, path):
        file = self.folder / path.removeprefix("/data/")
        if not file.is_file():
            self.answer(404, b"gone")
            return
        data = file.read_bytes()
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if first >= len(data):
            self.answer(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
            return
        last = min(last, len(data) - 1)
        extra = {"Content-Encoding": "gzip"} if self.behaviour == "packs" else {}
        told = {"boasts": PETABYTE, "boasts more": 10**18}.get(self.behaviour, len(data))
        if self.behaviour == "boasts" and last:
            self.answer(206, b"x", length=told, **{"Content-Range": f"bytes 0-{told - 1}/{told}"})
            return
        self.answer(206, data[first : last + 1], **{"Content-Range": f"bytes {first}-{last}/{told}"} | extra)
        if self.behaviour == "hangs up":
            self.close_connection = True

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body) if length is None else length)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection |= length is not None

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setattr(objects, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def serve(folder):
    class Mine(Server):
        pass

    Mine.folder, Mine.heads = folder, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    Mine.place = f"http://127.0.0.1:{server.server_port}/data"

    def stop():
        server.shutdown()
        thread.join()
        server.server_close()

    return Mine, stop


@pytest.fixture
def web(tmp_path):
    """Two shards of 60 images of noise, so that none has few bytes."""
    folder, draw = tmp_path / "far", np.random.default_rng(0)
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"s-{number}.tar", "w") as file:
            for i in range(COUNT // 2):
                buffer = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
                for name, data in ((f"{number}{i:03}.png", buffer.getvalue()), (f"{number}{i:03}.cls", b"0")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    mine, stop = serve(folder)
    yield mine
    stop()


def loaded(web, monkeypatch, block_bytes=1 << 14):
    """The set, without pixels in memory; blocks of about ten images."""
    monkeypatch.setattr(shards_module, "BLOCK_BYTES", block_bytes)
    images = load_shards(f"{web.place}/s-{{0..1}}.tar", None, cache_bytes=0)
    web.requests = web.connections = 0
    return images


def test_in_an_order_of_blocks_an_image_costs_a_tenth_of_a_request_and_no_connection(web, monkeypatch):
    monkeypatch.setattr(read_ahead_module, "HELD_BYTES", 6 << 14)  # those of a window, and not those before
    images = loaded(web, monkeypatch)
    blocks = len(images.block_starts)
    assert COUNT / 12 <= blocks <= COUNT / 6
    order = training_order(images, np.arange(COUNT), seed=0, window=4)
    near = load_shards(web.folder, None)
    for first in range(0, COUNT, 20):
        batch = load_batch(images, order, range(first, first + 20), flip=True, seed=1)
        assert (batch.images == load_batch(near, order, range(first, first + 20), flip=True, seed=1).images).all()
    assert web.requests == blocks
    assert web.connections <= 1
    assert images.ahead._let_go > read_ahead_module._JUDGED_AFTER


def test_blocks_are_the_same_near_and_far_and_hold_their_images(web, monkeypatch):
    images = loaded(web, monkeypatch)
    near = load_shards(web.folder, None)
    assert near.block_starts.tolist() == images.block_starts.tolist()
    assert (near.ahead, near.wants_blocks, images.wants_blocks) == (None, False, True)
    stops = [*images.block_starts[1:].tolist(), COUNT]
    for first, stop, (low, high) in zip(images.block_starts.tolist(), stops, images.block_spans.tolist(), strict=True):
        for index in range(first, stop):
            shard, row = images.shards[index // 60], index % 60
            assert low <= int(shard.offset[row]) <= int(shard.offset[row] + shard.size[row]) <= high
        assert first // 60 == (stop - 1) // 60, "no block lies in two shards"


def test_where_little_of_what_is_fetched_is_used_images_are_fetched_one_by_one(web, monkeypatch):
    monkeypatch.setattr(read_ahead_module, "HELD_BYTES", 1 << 14)
    monkeypatch.setattr(read_ahead_module, "REQUEST_BYTES", 1 << 9)  # blocks are small too
    images = loaded(web, monkeypatch)
    asked = []
    monkeypatch.setattr(images.store, "_range", counting(images.store._range, asked))
    order = SampleOrder(np.arange(COUNT), seed=0)
    load_batch(images, order, range(COUNT), flip=False, seed=0)
    stretches = [stop - start for _, start, stop in asked if stop - start > 4096]
    assert 4 <= len(stretches) <= 12
    assert len(asked) > 80


def counting(ask, asked):
    def counted(*arguments):
        asked.append(arguments)
        return ask(*arguments)

    return counted


@pytest.mark.faults
def test_a_shard_that_changes_far_away_is_noticed_and_asked_for_again(web, monkeypatch):
    images = loaded(web, monkeypatch)
    path = web.folder / "s-0.tar"
    data = path.read_bytes()
    at = int(images.shards[0].offset[3]) + 30
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ChangedFileError, match=r"'s-0.tar:0003.png'.*changed since it was checked"):
        images.read(3)
    path.write_bytes(data)
    assert images.read(3).shape == (8, 8, 3), "what came was not kept"
    assert images.read(4).shape == (8, 8, 3)


@pytest.mark.faults
def test_of_a_shard_that_was_cut_far_away_what_is_left_can_be_read(web, monkeypatch):
    images = loaded(web, monkeypatch)
    path = web.folder / "s-0.tar"
    path.write_bytes(path.read_bytes()[: int(images.shards[0].offset[5]) + 10])
    assert images.read(4).shape == (8, 8, 3)
    with pytest.raises(ChangedFileError, match="ends"):
        images.read(5)


def test_processes_do_not_share_connections(web, monkeypatch):
    images = loaded(web, monkeypatch)
    images.read(0)
    here = web.connections
    images.ahead._lock.acquire()  # as if a thread that the child has not got were at it
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            code = int(images.read(70).shape != (8, 8, 3))
        finally:
            os._exit(code)
    images.ahead._lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    before = web.connections
    assert before == here + 1
    images.read(119)
    assert web.connections == before


def test_a_connection_that_the_server_closed_is_opened_again_and_counts_as_no_failure(web):
    web.behaviour = "hangs up"
    store = open_store(web.place)
    data = (web.folder / "s-0.tar").read_bytes()
    for start in range(0, 5000, 500):
        assert store.read("s-0.tar", start, start + 10) == data[start : start + 10]
    assert web.connections == 10
    assert web.requests == 10


def test_a_file_without_a_byte_has_the_size_0(web):
    (web.folder / "empty").touch()
    assert open_store(web.place).size("empty") == 0
    assert open_store(web.place).read("empty") == b""


@pytest.mark.faults
def test_a_server_may_send_on_but_passwords_stay_with_the_first(web):
    other, stop = serve(web.folder)
    try:
        web.behaviour = "sends on"
        web.elsewhere = other.place.removesuffix("/data").replace("127.0.0.1", "them:theirs@localhost")
        there = web.place.replace("http://", "http://me:secret@").replace("/data", "/first") + "?token=hidden"
        store = open_store(there)
        assert store.read("s-0.tar", 0, 9) == (web.folder / "s-0.tar").read_bytes()[:9]
        assert store.place == web.place.replace("/data", "/first")
    finally:
        stop()
    assert [head["Authorization"] for head in web.heads] == ["Basic bWU6c2VjcmV0"]
    assert [head.get("Authorization") for head in other.heads] == [None]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("in circles", "without end"),
        ("to a file", "on to 'file'|on to file"),
        ("down", "on to 'ftp'|on to ftp"),
        ("packs", "packs what it sends"),
    ],
)
def test_servers_that_mislead_are_refused_in_one_line(web, behaviour, said):
    web.behaviour = behaviour
    with pytest.raises(StorageError, match=said) as caught:
        open_store(f"{web.place}?token=hidden").read("s-0.tar", 0, 10)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_a_server_that_promises_a_petabyte_takes_no_memory(web):
    web.behaviour = "boasts"
    with pytest.raises(StorageError, match="the answer ended after 1 of 1,125,899,906,842,624 bytes"):
        open_store(web.place).read("s-0.tar")
    web.behaviour = "boasts more"
    with pytest.raises(StorageError, match="the server does not tell the size"):
        open_store(web.place).read("s-0.tar")


def test_shards_of_a_web_server_are_listed_by_their_manifest_or_named(web):
    with pytest.raises(ConfigError, match=r"cannot be listed; name the files.*or put webdataset's index\.json"):
        load_shards(web.place, None)
    rows = [f'{{"url": "s-{n}.tar", "filesize": {(web.folder / f"s-{n}.tar").stat().st_size}}}' for n in range(2)]
    (web.folder / "index.json").write_text(f'{{"shardlist": [{", ".join(rows)}]}}')
    assert len(load_shards(web.place, None)) == COUNT
    assert f"{COUNT} images in 2 tar shards" in data_check.check(web.place).text
