"""Where Inception's weights come from: named, found, downloaded; and what is said of what is missing or wrong."""

import hashlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smalti.checkpoints.foreign import read_foreign
from smalti.errors import CheckpointError
from smalti.evaluation.networks import inception_weights
from smalti.evaluation.networks.inception_weights import (
    FILE_NAME,
    FILE_NAMES,
    SHA256,
    URL,
    download,
    find_inception_weights,
    progress_on_terminal,
    read_inception_weights,
)

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 5000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """`/whole` gives CONTENT, `/half` breaks off in its middle, `/slow` stops there and waits; else 404."""

    def do_GET(self):
        if self.path not in ("/whole", "/half", "/slow"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/whole" else CONTENT[: len(CONTENT) // 2])
        self.wfile.flush()
        if self.path == "/slow":
            self.server.released.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads = True
        running.released = threading.Event()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.released.set()
        running.shutdown()


@pytest.fixture
def closed():
    """An address at which nobody listens."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # held, so that nobody else begins to listen there
        yield f"http://127.0.0.1:{silent.getsockname()[1]}/whole"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Caches of this test alone; a proxy of the machine stays out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return {"own": tmp_path / "cache" / "smalti", "hub": tmp_path / "torch" / "hub" / "checkpoints"}


@pytest.fixture
def known(monkeypatch, server):
    """CONTENT is what the world knows, and the server has it."""
    monkeypatch.setattr(inception_weights, "SHA256", HASH)
    monkeypatch.setattr(inception_weights, "URL", f"{server}/whole")


def put(folder, name, content=CONTENT):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- downloading


def test_the_hash_begins_as_the_name_of_the_file_says():
    assert all(SHA256[:8] in name for name in FILE_NAMES)
    assert URL.endswith("/" + FILE_NAME)
    assert len(SHA256) == 64


def test_a_download_is_whole_and_tells_how_far_it_is(server, tmp_path):
    told = []
    target = tmp_path / "deeper" / "file.pth"
    download(f"{server}/whole", target, HASH, on_progress=lambda done, total: told.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert names_in(target.parent) == ["file.pth"]
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize(
    ("path", "sha256", "says"),
    [
        ("/whole", "0" * 64, f"gave 1,280,000 of 1,280,000 bytes with the SHA-256 {HASH}, expected 0000"),
        ("/half", HASH, "gave 640,000 of 1,280,000 bytes"),
        ("/none", HASH, "failed .the server says 404 Not Found"),
    ],
)
def test_another_file_half_a_file_or_none_leaves_nothing_behind(server, tmp_path, path, sha256, says):
    put(tmp_path / "f", "file.pth", b"what was there before")
    with pytest.raises(CheckpointError, match=says) as caught:
        download(server + path, tmp_path / "f" / "file.pth", sha256)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path / "f") == ["file.pth"]
    assert (tmp_path / "f" / "file.pth").read_bytes() == b"what was there before"


def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(inception_weights, "_TIMEOUT", 0.3)
    with pytest.raises(CheckpointError, match="timed out"):
        download(f"{server}/slow", tmp_path / "f" / "file.pth", HASH)
    assert names_in(tmp_path / "f") == []


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "f").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match=r"File exists|Not a directory"):
        download(f"{server}/whole", tmp_path / "f" / "file.pth", HASH)


def test_a_killed_download_leaves_nothing_that_looks_whole_and_the_next_one_cleans_up(server, known, places):
    target = places["own"] / FILE_NAME
    program = (
        "import sys; from pathlib import Path; from smalti.evaluation.networks.inception_weights import download; "
        "download(sys.argv[1], Path(sys.argv[2]), sys.argv[3])"
    )
    command = [sys.executable, "-c", program, f"{server}/slow", str(target), HASH]
    child = subprocess.Popen(command, cwd=ROOT)
    try:
        until = time.monotonic() + 60
        while not any(path.stat().st_size for path in places["own"].glob(".*.part")):
            assert child.poll() is None
            assert time.monotonic() < until, "nothing was downloaded"
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    (left,) = names_in(places["own"])
    assert left.endswith(".part")
    assert find_inception_weights() == target
    assert target.read_bytes() == CONTENT
    assert left in names_in(places["own"])  # it may belong to a process that still lives
    os.utime(places["own"] / left, (0, 0))
    target.unlink()
    find_inception_weights()
    assert names_in(places["own"]) == [FILE_NAME]


def test_progress_is_for_terminals_only(capsys, monkeypatch):
    progress_on_terminal(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress_on_terminal(50_000_000, 95_000_000)
    progress_on_terminal(95_000_000, 95_000_000)
    assert capsys.readouterr().err.endswith("\rdownloading the weights of Inception: 95 of 95 MB\n")


# --- finding


@pytest.mark.parametrize("place", ["own", "hub"])
@pytest.mark.parametrize("name", FILE_NAMES)
def test_both_names_are_found_in_both_places_without_a_network(known, places, closed, monkeypatch, place, name):
    monkeypatch.setattr(inception_weights, "URL", closed)
    expected = put(places[place], name)
    assert find_inception_weights() == expected


def test_a_damaged_file_in_a_usual_place_is_passed_over_for_a_whole_one(known, places, closed, monkeypatch):
    put(places["own"], FILE_NAME, CONTENT[:-1])
    whole = put(places["hub"], FILE_NAMES[1])
    monkeypatch.setattr(inception_weights, "URL", closed)
    assert find_inception_weights() == whole


def test_what_is_nowhere_is_downloaded_into_our_cache_and_found_there_again(known, places, closed, monkeypatch):
    told = []
    found = find_inception_weights(on_progress=lambda done, total: told.append(done))
    assert found == places["own"] / FILE_NAME
    assert told
    monkeypatch.setattr(inception_weights, "URL", closed)
    assert find_inception_weights() == found


def test_without_a_network_one_line_says_where_it_looked_and_what_to_do(known, places, closed, monkeypatch):
    monkeypatch.setattr(inception_weights, "URL", closed)
    put(places["hub"], FILE_NAME, b"half")
    with pytest.raises(CheckpointError) as caught:
        find_inception_weights()
    said = str(caught.value)
    assert "\n" not in said
    for part in (str(places["own"]), str(places["hub"]), *FILE_NAMES, closed, "refused", "--features inception:PATH"):
        assert part in said
    assert f"only damaged files ({places['hub'] / FILE_NAME})" in said
    assert names_in(places["own"]) == []


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"mine\.pth with the weights of Inception does not exist"):
        find_inception_weights(tmp_path / "mine.pth")


# --- reading

TENSORS = OrderedDict({"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)})


def write(path, old_form=False):
    torch.save(TENSORS, path, _use_new_zipfile_serialization=not old_form)
    return path


@pytest.mark.parametrize("form", ["mine.pth", "mine.safetensors"])
def test_weights_of_ones_own_are_read_and_are_not_the_published(tmp_path, form):
    path = tmp_path / form
    save_file(dict(TENSORS), path) if path.suffix == ".safetensors" else write(path)
    weights = read_inception_weights(path)
    assert not weights.published
    assert all(torch.equal(weights.tensors[key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize("old_form", [False, True], ids=["archive", "before torch 1.6"])
def test_the_published_file_is_known_by_its_hash_under_any_name(tmp_path, monkeypatch, old_form):
    path = write(tmp_path / "renamed.pth", old_form)
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    weights = read_inception_weights(path)
    assert weights.published
    assert all(torch.equal(weights.tensors[key], value) for key, value in TENSORS.items())


def test_the_old_form_is_refused_where_the_hash_does_not_say_what_it_is(tmp_path):
    path = write(tmp_path / "mine.pth", old_form=True)
    with pytest.raises(CheckpointError, match=r"bare pickle, torch's form before 1\.6"):
        read_inception_weights(path)


class RunsCode:
    """Makes a file when it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_old_form_runs_no_code_either(tmp_path):
    path = tmp_path / "bad.pth"
    torch.save({"a": RunsCode(tmp_path / "ran")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"asks for code|is damaged"):
        read_foreign(path, old_form=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_file_with_the_published_name_and_other_bytes_is_called_damaged(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"called like the published weights.*damaged") as caught:
        read_inception_weights(write(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert URL in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 and then nothing"])
def test_a_file_that_holds_no_weights_gets_one_line(tmp_path, content):
    path = put(tmp_path, "mine.pth", content)
    with pytest.raises(CheckpointError, match=r"mine\.pth") as caught:
        read_inception_weights(path)
    assert "\n" not in str(caught.value)
