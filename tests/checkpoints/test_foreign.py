"""Strangers' files: what is whole is read, what is not is one line, and nothing that they say is done."""

import argparse
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smalti.checkpoints import foreign
from smalti.checkpoints.foreign import read_foreign
from smalti.errors import CheckpointError, StorageError
from smalti.storage import precheck
from smalti.storage.precheck import MAX_HEADER, MAX_MEMBERS, MAX_PICKLE, check_safetensors, check_size, check_zip
from smalti.storage.tensors import file_pieces

ROOT = Path(__file__).parents[2]
GOOD = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3, dtype=torch.bfloat16)}
LOOP = Path(__file__).with_name("payload_loop.py")


# --- what is read


def save(path, value):
    torch.save(value, path)
    return path


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As released training scripts write it, optimizer and argparse.Namespace included."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    args = argparse.Namespace(model="DiT-S/2", image_size=256, num_classes=1000, lr=1e-4, wide=None, ema=True)
    args.weird = [object] * 0
    value = {"model": GOOD, "ema": {k: v + 1 for k, v in GOOD.items()}, "opt": optimizer.state_dict(), "args": args}
    return save(tmp_path_factory.mktemp("good") / "0050000.pt", value)


def test_the_average_of_a_training_checkpoint_is_taken_and_its_plain_settings_are_told(checkpoint):
    weights = read_foreign(checkpoint)
    assert weights.part == "ema"
    same(weights.tensors, {k: v + 1 for k, v in GOOD.items()})
    assert weights.settings == {
        "model": "DiT-S/2",
        "image_size": 256,
        "num_classes": 1000,
        "lr": 1e-4,
        "wide": None,
        "ema": True,
    }


def test_the_other_weights_of_a_training_checkpoint_are_taken_when_asked_for(checkpoint):
    weights = read_foreign(checkpoint, "model")
    assert weights.part == "model"
    same(weights.tensors, GOOD)


def test_plain_weights_come_from_either_format_in_their_types(tmp_path):
    save_file(GOOD, tmp_path / "w.safetensors")
    for path in (save(tmp_path / "w.pt", GOOD), tmp_path / "w.safetensors"):
        weights = read_foreign(path)
        assert (weights.part, weights.settings) == ("plain", {})
        same(weights.tensors, GOOD)


def test_weights_that_are_not_there_are_not_replaced_by_others(tmp_path):
    path = save(tmp_path / "w.pt", {"model": GOOD})
    with pytest.raises(CheckpointError, match="has no part 'ema': it holds model"):
        read_foreign(path, "ema")
    save_file(GOOD, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="plain weights only"):
        read_foreign(tmp_path / "w.safetensors", "ema")


# --- pickles that want something done


class Call:
    """Unpickled, it calls."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class State:
    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return argparse.Namespace, (), self.state


def archive(path, data, members=(), compression=zipfile.ZIP_STORED):
    """A file like torch.save's around a pickle that it would never write."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        for name, content in members:
            file.writestr(name, content)
    return path


def opcodes(*parts):
    return b"\x80\x02" + b"".join(p.encode() if isinstance(p, str) else p for p in parts) + b"."


def payloads(folder, canary):
    """At least 25 ways to ask for code, most of which would leave the canary behind; some only import or construct."""
    import builtins
    import functools
    import importlib
    import operator
    import runpy
    import shutil
    import socket

    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    (folder.parent / "evil.py").write_text(code)
    calls = {
        "reduce_system": Call(os.system, touch),
        "reduce_popen": Call(os.popen, touch),
        "reduce_subprocess": Call(subprocess.Popen, ["touch", str(canary)]),
        "reduce_check_output": Call(subprocess.check_output, ["touch", str(canary)]),
        "reduce_exec": Call(builtins.exec, code),
        "reduce_eval": Call(builtins.eval, code),
        "reduce_compile": Call(builtins.compile, code, "x", "exec"),
        "reduce_open": Call(builtins.open, str(canary), "w"),
        "reduce_import": Call(importlib.import_module, "antigravity"),
        "reduce_dunder_import": Call(builtins.__import__, "os"),
        "reduce_runpy": Call(runpy.run_path, str(folder.parent / "evil.py")),
        "reduce_move": Call(shutil.copy, str(folder.parent / "evil.py"), str(canary)),
        "reduce_remove": Call(os.remove, str(folder.parent / "evil.py")),
        "reduce_socket": Call(socket.create_connection, ("127.0.0.1", 9)),
        "reduce_partial": Call(functools.partial, os.system, touch),
        "reduce_methodcaller": Call(operator.methodcaller, "system", touch),
        "reduce_spawn": Call(os.posix_spawn, "/bin/touch", ["touch", str(canary)], {}),
        "reduce_torch_load": Call(torch.load, str(folder.parent / "inner.pt")),
        "reduce_hub": Call(torch.hub.load, "a/b", "c"),
        "reduce_loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "reduce_ctypes": Call(importlib.import_module, "ctypes"),
    }
    for name, call in calls.items():
        save(folder / f"{name}.pt", {"a": call})
    for name, value in {
        "nested_in_args": {"ema": GOOD, "args": argparse.Namespace(hook=Call(os.system, touch))},
        "nested_in_opt": {"ema": GOOD, "opt": {"state": [Call(os.system, touch)]}},
        "as_a_key": {"ema": GOOD, "x": [Call(builtins.eval, code)]},
        "build_with_setstate": {"ema": GOOD, "args": State({"__setstate__": Call(os.system, touch)})},
        "whole_module": torch.nn.Linear(2, 2),
        "own_class": {"ema": GOOD, "args": Path("x")},
    }.items():
        save(folder / f"{name}.pt", value)
    archive(folder / "opcode_global.pt", opcodes("cos\nsystem\n", f"(V{touch}\n", "tR"))
    archive(folder / "opcode_inst.pt", opcodes(f"(V{touch}\n", "ios\nsystem\n"))
    archive(folder / "opcode_obj.pt", opcodes("(cos\nsystem\n", f"V{touch}\n", "o"))
    archive(folder / "opcode_newobj.pt", opcodes("csubprocess\nPopen\n", f"(V{touch}\n", "t\x81"))
    archive(folder / "opcode_stack_global.pt", opcodes("\x8c\x02os\x8c\x06system\x93", f"(V{touch}\n", "tR"))
    archive(folder / "opcode_build.pt", opcodes("cargparse\nNamespace\n)\x81}", "V__class__\ncos\nsystem\nsb"))
    archive(folder / "opcode_ext.pt", opcodes(b"\x82\x01"))
    archive(folder / "opcode_persid.pt", opcodes("Pcos.system\n"))
    archive(folder / "opcode_dotted.pt", opcodes("\x8c\x08argparse\x8c\x14Namespace.__init__.x\x93"))
    return folder


def read_all(folder, guard):
    """What the reading process answers about each file of a folder."""
    command = [sys.executable, "-W", "ignore", str(LOOP), str(folder), guard]
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.run(command, env=path, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def malicious(tmp_path_factory):
    root = tmp_path_factory.mktemp("payloads")
    folder = root / "files"
    folder.mkdir()
    save(root / "inner.pt", {"a": Call(os.system, f"touch {root / 'canary'}")})
    return payloads(folder, root / "canary")


@pytest.mark.faults
@pytest.mark.parametrize("guard", ["guarded", "bare"])
def test_no_payload_runs_and_each_is_refused_with_and_without_the_guard_of_the_process(malicious, guard):
    results = read_all(malicious, guard)
    assert len(results) >= 25
    for name, said in results.items():
        assert said.get("events") == [], (name, said)
        assert "refused" in said or "damaged" in said, (name, said)
    assert "posix.system" in results["reduce_system.pt"]["globals"]
    assert not (malicious.parent / "canary").exists()
    assert (malicious.parent / "evil.py").exists()


@pytest.mark.faults
def test_the_loop_over_payloads_would_see_one_that_runs(tmp_path):
    code = "import sys; sys.addaudithook(lambda e, a: print(e) if e == 'os.system' else None); import pickle; "
    save_bytes = pickle.dumps(Call(os.system, f"touch {tmp_path / 'canary'}"))
    run = subprocess.run(
        [sys.executable, "-c", code + f"pickle.loads({save_bytes!r})"], capture_output=True, text=True, check=True
    )
    assert "os.system" in run.stdout
    assert (tmp_path / "canary").exists()


@pytest.mark.faults
def test_the_whole_way_refuses_a_payload_and_names_what_it_asks_for(malicious):
    with pytest.raises(CheckpointError, match=r"asks for code when it is read \(posix\.system\)") as caught:
        read_foreign(malicious / "reduce_system.pt")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(CheckpointError):
        read_foreign(malicious / "opcode_build.pt")
    assert not (malicious.parent / "canary").exists()


DEEDS = (
    "open('canary', 'w')",
    "os.system('true')",
    "subprocess.run(['true'])",
    "socket.socket()",
    "exec('1')",
    "os.fork()",
    "os.remove('x')",
    "sys.addaudithook(print)",
)
TRIES = """
import os, socket, subprocess, sys
from smalti.storage import unpickle
deeds = [compile(deed, "deed", "eval") for deed in sys.argv[1:]]
unpickle.forbid()
for deed in deeds:
    try:
        eval(deed)
    except PermissionError as error:
        print(error)
"""


def python(code, *arguments, **options):
    """Output of a fresh interpreter that finds this repository."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=path, capture_output=True, text=True, check=True, **options).stdout


@pytest.mark.faults
def test_the_guard_stops_what_gets_past_the_unpickler(tmp_path):
    said = python(TRIES, *DEEDS, cwd=tmp_path).splitlines()
    assert len(said) == len(DEEDS)
    assert all(line.startswith("reading weights must not do ") for line in said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_the_process_has_no_network_where_the_kernel_allows_it():
    code = "from smalti.storage import isolate; print(isolate.leave_network(), open('/proc/net/dev').read().count(':'))"
    left, devices = python(code).split()
    if left != "True":
        pytest.skip("this kernel lets no process leave its network")
    assert int(devices) <= 1  # only a loopback, which is down


# --- tensors that are not what they seem


ODD = {
    "list": ([torch.ones(1)], "holds one list"),
    "empty": ({}, "holds no tensors"),
    "number": ({"a": torch.ones(1), "b": 3}, "holds b = a int"),
    "key": ({3: torch.ones(1)}, "without a printable name"),
    "escape": ({"\x1b[2J": torch.ones(1)}, "without a printable name"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, "no plain tensor"),
    "meta": ({"a": torch.ones(2, device="meta")}, "(torch.strided, meta)"),
    "blown_up": ({"a": torch.zeros(1).expand(1 << 40)}, "its tensors would have"),
}


@pytest.mark.faults
def test_what_is_no_table_of_plain_tensors_is_refused_before_it_is_made(tmp_path):
    for name, (value, _) in ODD.items():
        save(tmp_path / name, value)
    for name, said in read_all(tmp_path, "guarded").items():
        assert ODD[name][1] in said["refused"], said


# --- archives


@pytest.mark.faults
def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = archive(tmp_path / "w.pt", b"\0" * (300 << 20), compression=zipfile.ZIP_DEFLATED)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="may be a bomb"):
        check_zip(path)
    assert time.process_time() - started < 1


@pytest.mark.faults
def test_an_archive_of_very_many_members_is_refused_at_once(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(MAX_MEMBERS + 1):
            file.writestr(f"archive/data/{i}", b"")
    started = time.process_time()
    with pytest.raises(CheckpointError, match="members: at most"):
        read_foreign(path)
    assert time.process_time() - started < 1


@pytest.mark.faults
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("archive/code/__torch__.py", "x")], "TorchScript"),
        ([("archive/constants.pkl", "x")], "TorchScript"),
        ([("../../evil", "x")], "none that torch.save writes"),
        ([("other/data/0", "x")], "none that torch.save writes"),
        ([("archive/a.npy", "x")], "none that torch.save writes"),
        ([("archive/data.pkl", "x")], "none that torch.save writes"),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path, members, message):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)  # zipfile minds a name that stands twice
        path = archive(tmp_path / "w.pt", pickle.dumps({}), members)
    with pytest.raises(CheckpointError, match=message):
        read_foreign(path)


def listed(path, name, place, value):
    """The archive with another number in what its listing says of a member."""
    content = bytearray(path.read_bytes())
    at = content.rindex(name) - 46
    assert content[at : at + 4] == b"PK\1\2"
    content[at + place : at + place + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.faults
def test_members_that_are_secret_or_said_to_be_larger_are_refused(tmp_path):
    path = listed(archive(tmp_path / "a.pt", b"x" * 99), b"archive/data.pkl", 8, b"\1")
    with pytest.raises(CheckpointError, match="is encrypted: give the plain file"):
        check_zip(path)
    path = listed(archive(tmp_path / "b.pt", b"x" * 99), b"archive/data.pkl", 24, struct.pack("<I", 100))
    with pytest.raises(CheckpointError, match="may be a bomb"):
        check_zip(path)
    path = archive(tmp_path / "c.pt", b"x" * 99)
    large = struct.pack("<II", path.stat().st_size, path.stat().st_size)
    with pytest.raises(CheckpointError, match="its members lie over one another"):
        check_zip(listed(path, b"archive/version", 20, large))
    path = archive(tmp_path / "d.pt", b"x" * (MAX_PICKLE + 1))
    with pytest.raises(CheckpointError, match="its list of tensors has 33,554,433 bytes"):
        check_zip(path)
    path = listed(archive(tmp_path / "e.pt", b"x" * 99), b"archive/data.pkl", 10, b"\x08")  # packed, of equal size
    with pytest.raises(CheckpointError, match="may be a bomb"):
        check_zip(path)
    path = listed(archive(tmp_path / "f.pt", b"x" * 99), b"archive/data.pkl", 6, b"\x63")
    with pytest.raises(CheckpointError, match=r"damaged or cut short: zip file version 9\.9"):
        check_zip(path)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("place", "number"),
    [(8, b"\xfe\xff"), (10, b"\xfe\xff"), (12, struct.pack("<I", MAX_MEMBERS * 256 + 1)), (None, MAX_MEMBERS + 1)],
    ids=["members here", "members", "bytes of their listing", "members in the long form"],
)
def test_how_much_an_archive_promises_is_looked_at_before_it_is_opened(tmp_path, place, number):
    content = bytearray(archive(tmp_path / "w.pt", b"x").read_bytes())
    end = content.rindex(b"PK\5\6")
    if place is None:
        content[end:end] = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, number, 99, 0)
    else:
        content[end + place : end + place + len(number)] = number
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="members: at most"):
        check_zip(tmp_path / "w.pt")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["archive/version", "a/b/data.pkl"])
def test_an_archive_without_the_list_of_tensors_in_its_place_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
        file.writestr(name, b"3")
    with pytest.raises(CheckpointError, match=r"none that torch\.save writes"):
        check_zip(tmp_path / "w.pt")


@pytest.mark.faults
def test_what_is_no_file_or_of_no_possible_size_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is no file of 1 to"):
        check_size(tmp_path)
    monkeypatch.setattr(precheck, "MAX_FILE", 9)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "large").write_bytes(bytes(10))
    for path in (tmp_path / "empty", tmp_path / "large"):
        with pytest.raises(CheckpointError, match="is no file of 1 to 9 bytes"):
            check_size(path)
    (tmp_path / "large").write_bytes(bytes(9))
    assert check_size(tmp_path / "large") == 9


@pytest.mark.faults
def test_no_flipped_or_missing_byte_of_an_archive_goes_unnoticed(tmp_path):
    # Every byte of the tensors is covered by a checksum; those of the archive itself may be of no meaning.
    content = save(tmp_path / "w.pt", GOOD).read_bytes()
    start = content.index(GOOD["a.weight"].numpy().tobytes())
    rng = random.Random(0)
    path = tmp_path / "x.pt"
    for _ in range(100):
        flipped = bytearray(content)
        flipped[start + rng.randrange(24)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="damaged"):
            check_zip(path)
        path.write_bytes(content[: rng.randrange(len(content))])
        with pytest.raises(CheckpointError):
            check_zip(path)


# --- safetensors headers


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "empty": b"",
    "short": b"\1\0\0",
    "huge_length": header({"a": entry()}, length=1 << 62),
    "length_past_end": header({"a": entry()}, length=10_000),
    "over_the_cap": header(json.dumps({"a": entry()}).encode() + b" " * MAX_HEADER, b"\0" * 4),
    "garbage": header(b"\xff\xfe\0{"),
    "no_table": header(b"[1,2]"),
    "past_end": header({"a": entry(offsets=(0, 4))}, b"\0\0"),
    "trailing": header({"a": entry()}, b"\0" * 9),
    "hole": header({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12),
    "overlap": header({"a": entry(), "b": entry(offsets=(0, 4))}, b"\0" * 4),
    "wrong_shape": header({"a": entry(shape=(2,))}, b"\0" * 4),
    "negative": header({"a": entry(shape=(-1,), offsets=(0, -4))}),
    "overflow": header({"a": entry(shape=(1 << 40, 1 << 40))}, b"\0" * 4),
    "boolean": header({"a": entry(shape=(True,))}, b"\0" * 4),
    "duplicate": header(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 4),
    "unknown_type": header({"a": entry(dtype="OBJ")}, b"\0" * 4),
    "type_is_a_list": header({"a": entry() | {"dtype": []}}, b"\0" * 4),
    "deep": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "notes": header({"__metadata__": {"a": 1}, "a": entry()}, b"\0" * 4),
    "notes_are_a_list": header({"__metadata__": ["a"], "a": entry()}, b"\0" * 4),
    "extra_key": header({"a": entry() | {"code": "x"}}, b"\0" * 4),
    "no_tensors": header({"__metadata__": {}}),
    "very_many": header({f"{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(20_000)}),
    "escape": header({"\x1b]0;x": entry()}, b"\0" * 4),
    "long_name": header({"a" * 513: entry()}, b"\0" * 4),
    "many_axes": header({"a": entry(shape=(1,) * 17)}, b"\0" * 4),
    "long_and_empty": header({"a": entry(shape=(1 << 60, 0), offsets=(0, 0))}),
    "three_offsets": header({"a": entry(offsets=(0, 4, 4))}, b"\0" * 4),
    "no_entry": header({"a": 4}, b"\0" * 4),
    "big_number": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"\0" * 4),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", HEADERS)
def test_a_bad_header_is_refused_in_a_tenth_of_a_second(tmp_path, name):
    path = tmp_path / "w.safetensors"
    path.write_bytes(HEADERS[name])
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_foreign(path)
    assert time.process_time() - started < 0.1
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError):  # before the library of the format has seen it
        check_safetensors(path)


@pytest.mark.faults
def test_a_tensor_name_is_never_a_path(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"".join(map(bytes, file_pieces({"../../etc/passwd": torch.ones(1)}))))
    assert list(read_foreign(path).tensors) == ["../../etc/passwd"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.faults
@pytest.mark.parametrize("mutants", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_headers_are_refused_or_harmless_and_never_a_crash(tmp_path, mutants):
    good = b"".join(map(bytes, file_pieces(GOOD)))
    length = 8 + int.from_bytes(good[:8], "little")
    rng, path, refused = random.Random(1), tmp_path / "w.safetensors", 0
    for _ in range(mutants):
        mutant = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(length)] = rng.randrange(256)
        path.write_bytes(mutant)
        try:
            check_safetensors(path)
        except CheckpointError:
            refused += 1
        else:
            same_bytes = sum(t.nbytes for t in foreign.read_tensors(path).values())
            assert same_bytes == len(good) - length
    assert refused > 0.6 * mutants


# --- other kinds


def old_torch(path):
    torch.save(GOOD, path, _use_new_zipfile_serialization=False)


def tar(path):
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("pickle")
        info.size = 4
        file.addfile(info, io.BytesIO(b"\x80\x02N."))


KINDS = {
    "old.pt": (old_torch, "a bare pickle, torch's form before 1.6"),
    "plain.bin": (lambda p: p.write_bytes(pickle.dumps({}, 4)), "a bare pickle"),
    "old.tar.pt": (tar, "a tar archive"),
    "model.gguf": (lambda p: p.write_bytes(b"GGUF" + bytes(60)), "a GGUF file"),
    "model.bin": (lambda p: p.write_bytes(b"GGUF" + bytes(60)), "a GGUF file"),
    "last.ckpt": (lambda p: torch.save(GOOD, p), "save its state_dict as safetensors"),
    "w.h5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60)), "an HDF5 file"),
    "w.pt": (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(60)), "gzipped"),
    "w.pth": (lambda p: p.write_bytes(b"hello, this is text"), "neither an archive"),
    "empty.pt": (lambda p: p.write_bytes(b""), "no file of 1 to"),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_file_are_refused_with_advice(tmp_path, name):
    make, message = KINDS[name]
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_foreign(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.faults
def test_folders_are_refused_with_advice_and_nothing_in_them_is_read(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Call(os.system, f"touch {canary}")))
    with pytest.raises(CheckpointError, match=r"torch\.distributed\.checkpoint, which can run code"):
        read_foreign(tmp_path / "dcp")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a model folder, not a file"):
        read_foreign(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_foreign(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_foreign(tmp_path / "nothing.pt")
    assert not canary.exists()


# --- the process itself


@pytest.mark.faults
@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", CheckpointError, "broke the process that read it .SIGSEGV"),
        ("raise SystemExit(3)", CheckpointError, "ended with: without a word"),
        ("print('[1]')", CheckpointError, "ended with"),
        ("import json; print(json.dumps({'errno': 28, 'damaged': 'x'}))", StorageError, "set TMPDIR"),
        ('print(\'{"part": "ema", "settings": {}}\')', CheckpointError, "no file of 1 to"),
    ],
)
def test_whatever_becomes_of_the_process_is_one_line(checkpoint, monkeypatch, program, error, message):
    monkeypatch.setattr(foreign, "_PROGRAM", program)
    with pytest.raises(error, match=message) as caught:
        read_foreign(checkpoint)
    assert len(str(caught.value).splitlines()) == 1
