"""Compiling at first use: no compiler, a broken one, a damaged or unwritable cache, two processes at once."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalti.ops import bi_wkv, native
from smalti.ops.bi_wkv import c

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
SIX = "int six(void) { return 6; }\n"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has compiled nothing yet, with a cache folder of its own."""
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "cache")
    source = tmp_path / "six.c"
    source.write_text(SIX)
    return source


def kept(tmp_path):
    return sorted((tmp_path / "cache").glob("*.so"))


@needs_compiler
def test_the_second_process_takes_what_the_first_compiled(fresh, monkeypatch, tmp_path):
    assert native.load_native(fresh).library.six() == 6
    assert native.load_native(fresh) is native.load_native(fresh)
    (first,) = kept(tmp_path)
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_compile", lambda *args: pytest.fail("compiled again"))
    assert native.load_native(fresh).library.six() == 6
    assert first.stat().st_mtime_ns == before


@needs_compiler
def test_another_source_or_processor_is_compiled_anew(fresh, monkeypatch, tmp_path):
    native.load_native(fresh)
    fresh.write_text(SIX.replace("6", "7"))
    monkeypatch.setattr(native, "_loaded", {})
    assert native.load_native(fresh).library.six() == 7
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_processor", lambda: "another one")
    assert native.load_native(fresh).library.six() == 7
    assert len(kept(tmp_path)) == 3


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_library_is_not_loaded_but_compiled_again(fresh, monkeypatch, tmp_path, damage):
    native.load_native(fresh)
    (path,) = kept(tmp_path)
    content = path.read_bytes()
    path.unlink()  # the process has it open
    bad = {"cut": content[: len(content) // 2], "changed": content[:-1] + b"?", "emptied": b""}[damage]
    path.write_bytes(bad)
    monkeypatch.setattr(native, "_loaded", {})
    assert native.load_native(fresh).library.six() == 6


@needs_compiler
def test_a_cache_that_cannot_be_written_or_that_others_can_write_is_not_used(fresh, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    assert native.load_native(fresh).library.six() == 6
    (tmp_path / "cache").unlink()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setattr(native, "_loaded", {})
    assert native.load_native(fresh).library.six() == 6
    assert kept(tmp_path) == []


@needs_compiler
def test_a_source_that_does_not_compile_gives_the_first_complaint(fresh):
    fresh.write_text("int six(void) { return sixx; }\n")
    answer = native.load_native(fresh)
    assert answer.library is None
    assert "cannot compile six.c" in answer.reason
    assert "\n" not in answer.reason


def test_no_compiler_gives_a_reason_with_a_remedy(fresh, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    answer = native.load_native(fresh)
    assert answer.library is None
    assert "install one that answers to 'cc', such as gcc or clang" in answer.reason


def test_a_compiler_that_does_not_run_gives_a_reason(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    assert "does not run" in native.load_native(fresh).reason


def test_without_a_compiler_bi_wkv_says_so_once_and_works(fresh, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    c._answer.cache_clear()
    try:
        args = bi_wkv.example(9, torch.float32)
        with caplog.at_level(logging.WARNING, logger="smalti"):
            outputs = [bi_wkv(*args) for _ in range(3)]
            torch.autograd.grad(outputs[0].sum(), args)
        (record,) = [r for r in caplog.records if r.name == "smalti"]
        assert "times slower" in record.message
        assert "install one" in record.message
        assert torch.equal(outputs[0], bi_wkv(*args, impl="prefix"))
        with pytest.raises(ValueError, match="'c' cannot take these inputs: there is no C compiler"):
            bi_wkv(*args, impl="c")
    finally:
        c._answer.cache_clear()


@needs_compiler
def test_two_processes_that_compile_at_once_both_get_a_library(tmp_path):
    (tmp_path / "six.c").write_text(SIX)
    program = "import sys, pathlib; from smalti.ops.native import load_native; "
    program += "print(load_native(pathlib.Path(sys.argv[1])).library.six())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, str(tmp_path / "six.c")]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, "6"), err
    assert list(tmp_path.rglob("build-*")) == []
    assert len(list(tmp_path.rglob("six-*.so"))) in (1, 2)


def test_importing_the_op_compiles_nothing():
    program = "import smalti.ops.native as n; import smalti.ops; print(n._loaded)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == "{}"
