"""The stored index of a folder: what was found once is not looked for again, and what changed is."""

import os
import random
import shutil
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from smalti.cli import main
from smalti.data import folder_pass as passes
from smalti.data import load_image_set
from smalti.data.changed import ChangedFileError
from smalti.data.folder import load_folder
from smalti.data.folder_index import BESIDE, index_path, read_known, write_known
from smalti.data.folder_pass import index_folder
from smalti.data.index_file import index_bytes, parse_index
from smalti.errors import DataError, StorageError
from smalti.workflows.data_check import check


def put(path, colour=(9, 9, 9), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def animals(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "FRESH_NS", -(10**10))  # no file here is too fresh to be believed
    root = tmp_path / "animals"
    for i in range(6):
        put(root / "cats" / f"{i}.png", (i, 0, 0))
        put(root / "dogs" / f"caf\udce9\n{i}.png", (0, i, 0))
    (root / "cats" / "list.txt").write_text("x")
    check(str(root))
    return root


@pytest.fixture
def opened(monkeypatch):
    """Paths of the files that are opened from now on."""
    seen, real = [], passes.read_regular_file
    monkeypatch.setattr(passes, "read_regular_file", lambda root, path: seen.append(path) or real(root, path))
    return seen


def without_index(root, **options):
    path = index_path(root)
    path.rename(path.with_suffix(".away"))
    try:
        return load_folder(root, None, **options)
    finally:
        path.with_suffix(".away").rename(path)


def same(one, other):
    assert one.fingerprint == other.fingerprint
    assert one.item_names == other.item_names
    assert one.split_names == other.split_names
    assert one.class_names == other.class_names
    assert one.class_labels.tolist() == other.class_labels.tolist()
    assert one.index.entries == other.index.entries
    assert one.index.rejected == other.index.rejected


def test_a_set_by_its_stored_index_is_the_set_of_a_fresh_pass(animals, opened):
    stored = load_image_set(animals)
    assert opened == []
    same(stored, without_index(animals))
    for i in range(12):
        assert stored.read(i).tolist() == without_index(animals).read(i).tolist()


def test_sizes_kinds_and_notes_are_stored_too(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "FRESH_NS", -(10**10))
    root = tmp_path / "odd"
    put(root / "wide.png", size=(8, 4))
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("white", "black")]
    frames[0].save(root / "two frames.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (8, 4)).save(root / "print.jpg")
    check(str(root))
    stored = load_image_set(root)
    same(stored, without_index(root))
    assert stored.image_size == (4, 8)
    assert [entry.notes for entry in stored.index.entries if entry.format == "GIF"] == [
        ("animated or multi-page: only frame 0 is used",)
    ]


@pytest.mark.faults
@pytest.mark.parametrize("change", ["add", "remove", "overwrite", "rename", "relabel", "touch", "break", "mend"])
def test_changed_files_are_looked_at_again_and_no_others(animals, opened, change):
    cat = animals / "cats" / "3.png"
    expected = []
    match change:
        case "add":
            put(animals / "cats" / "new.png")
            expected = ["cats/new.png"]
        case "remove":
            cat.unlink()
        case "overwrite":
            # Of the same size, and with the time of before.
            before = os.stat(cat)
            put(cat, (4, 0, 0))
            os.utime(cat, ns=(before.st_atime_ns, before.st_mtime_ns))
            expected = ["cats/3.png"]
        case "rename":
            cat.rename(cat.with_name("33.png"))
            expected = ["cats/33.png"]
        case "relabel":
            cat.rename(animals / "dogs" / "3.png")
            expected = ["dogs/3.png"]
        case "touch":
            os.utime(cat)
            expected = ["cats/3.png"]
        case "break":
            cat.write_bytes(cat.read_bytes()[:40])
            with pytest.raises(DataError, match=r"1 of 12 files cannot be used \('cats/3.png'"):
                load_image_set(animals)
            assert opened == ["cats/3.png"]
            with pytest.raises(DataError, match=r"1 of 12 files cannot be used \('cats/3.png'"):
                load_image_set(animals)
            assert opened == ["cats/3.png"], "its reason is stored too"
            same(load_folder(animals, None, skip_unreadable=True), without_index(animals, skip_unreadable=True))
            return
        case "mend":
            cat.write_bytes(b"")
            check(str(animals))
            put(cat, (3, 0, 0))
            opened.clear()
            expected = ["cats/3.png"]
    first = load_image_set(animals)
    assert opened == expected
    opened.clear()
    same(load_image_set(animals), first)
    assert opened == [], "what was found anew is stored"
    same(first, without_index(animals))


def test_a_new_class_shifts_the_labels_of_files_that_did_not_change(animals, opened):
    put(animals / "ants" / "0.png", (1, 1, 1))
    stored = load_image_set(animals)
    assert opened == ["ants/0.png"]
    assert stored.class_names == ("ants", "cats", "dogs")
    same(stored, without_index(animals))


@pytest.mark.faults
def test_a_damaged_index_is_not_believed_in_any_bit(animals, opened):
    path = index_path(animals)
    data = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        place = draw.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
        assert read_known(animals) is None
        path.write_bytes(data[:place])
        assert read_known(animals) is None
    path.write_bytes(b"")
    fresh = load_image_set(animals)
    assert len(opened) == 13, "all files are opened again"
    path.write_bytes(data)
    same(load_image_set(animals), fresh)


def test_a_folder_has_one_index_by_whatever_path_it_is_reached(animals, monkeypatch):
    os.symlink(animals, animals.with_name("link"))
    assert index_path(animals.with_name("link")) == index_path(animals)
    monkeypatch.chdir(animals.parent)
    assert index_path(Path("animals")) == index_path(animals)
    monkeypatch.chdir(animals)
    assert index_path(Path("animals")) != index_path(animals)


def test_an_index_of_another_version_is_not_read(animals):
    path = index_path(animals)
    found = parse_index(path.read_bytes())
    path.write_bytes(index_bytes(type(found)(found.facts | {"version": 2}, found.columns, found.names)))
    assert read_known(animals) is None


def test_files_written_a_moment_ago_are_not_stored(tmp_path):
    put(tmp_path / "a.png")
    report = check(str(tmp_path))
    assert report.text.endswith("index: not stored, because the files were written a moment ago; check again later")
    assert read_known(tmp_path) is None


def test_a_changed_file_is_noticed_under_a_run_and_read_ones_stay_in_memory(animals):
    images = load_image_set(animals)
    assert images.cache is None
    assert images.read(0)[0, 0].tolist() == [0, 0, 0]
    shutil.rmtree(animals)
    assert images.read(0)[0, 0].tolist() == [0, 0, 0]
    with pytest.raises(ChangedFileError):
        images.read(1)


def test_of_a_large_set_nothing_stays_in_memory(animals):
    images = load_folder(animals, None, cache_bytes=0)
    assert images.read(0)[0, 0].tolist() == [0, 0, 0]
    shutil.rmtree(animals)
    with pytest.raises(ChangedFileError):
        images.read(0)


def test_an_index_beside_the_data_serves_everybody(animals, tmp_path, monkeypatch, opened):
    report = check(str(animals), beside=True)
    assert report.text.endswith(f"index: {animals / BESIDE / 'folder.index'}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of somebody else"))
    opened.clear()
    assert len(load_image_set(animals)) == 12
    assert opened == []
    assert not (tmp_path / "of somebody else").exists()


def test_an_index_that_cannot_be_stored_is_an_error_of_the_check_and_none_of_a_run(animals, tmp_path, monkeypatch):
    put(animals / "cats" / "new.png")
    (tmp_path / "file").write_text("")
    known = read_known(animals)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot be stored .*; set XDG_CACHE_HOME"):
        write_known(animals, index_folder(animals))
    monkeypatch.setattr("smalti.data.folder.read_known", lambda root: known)
    assert len(load_image_set(animals)) == 13


@pytest.mark.faults
def test_a_folder_of_many_files_starts_in_seconds(tmp_path, monkeypatch):
    """A tenth of 100,000 files, which take 2.1 s by their index, and a minute without."""
    monkeypatch.setattr(passes, "FRESH_NS", -(10**10))
    root = tmp_path / "many"
    put(root / "0" / "0.png")
    for i in range(1, 10_000):
        folder = root / str(i % 10)
        folder.mkdir(exist_ok=True)
        os.link(root / "0" / "0.png", folder / f"{i}.png")
    write_known(root, index_folder(root))
    started = time.process_time()
    assert len(load_image_set(root)) == 10_000
    assert time.process_time() - started < 5


# The command


def test_a_second_check_opens_no_file_again(animals, opened):
    first = check(str(animals)).text
    assert opened == []
    assert check(str(animals)).text == first


def test_data_check_counts_over_all_shards_and_misses_none(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, mode in enumerate(("RGB", "RGB", "L")):
        Image.new(mode, (8, 8), number).save(tmp_path / "x.png")
        (tmp_path / "x.txt").write_text("a caption")
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for suffix in ("png", "txt"):
                archive.add(tmp_path / f"x.{suffix}", f"{number}.{suffix}")
    lines = check(str(folder)).text.splitlines()
    assert lines[0] == f"{folder}: 3 images in 3 tar shards, 0 unusable files"
    assert "formats: PNG RGB 2, PNG L 1" in lines
    left_out = [f"left out '{n}.tar:{n}.txt': neither an image nor a label" for n in range(3)]
    assert [line for line in lines if ".txt" in line] == left_out
    (folder / "index.json").write_text('{"shardlist": [{"url": "3.tar"}]}')
    with pytest.raises(DataError, match=r"1 of 1 shards that index.json lists are missing, such as '3.tar'"):
        check(str(folder))


def test_data_check_reads_shards_and_ends_with_65_where_nothing_can_be_used(animals, tmp_path, capsys):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(animals, ".")
    assert main(["data", "check", str(tmp_path / "x.tar")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: 12 images in 1 tar shards, 0 unusable files"
    assert "sizes: 1, 8 x 8 (rows x columns)" in lines
    assert "exact copies: 1 (a split keeps them together)" in lines
    assert "  0 'cats': 6 images" in lines
    assert "left out 'x.tar:cats/list.txt': neither an image nor a label" in lines
    assert not (tmp_path / BESIDE).exists()
    check(str(tmp_path / "x.tar"), beside=True)
    assert [path.name for path in (tmp_path / BESIDE).iterdir()] == ["x.tar.index"]
    for path in animals.rglob("*.png"):
        path.write_bytes(b"")
    assert main(["data", "check", str(animals)]) == 65
    said = capsys.readouterr()
    assert "0 images, 12 unusable files" in said.out
    assert "nothing in it can be used" in said.err
    (tmp_path / "x.tar").unlink()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(animals, ".")
    assert main(["data", "check", str(tmp_path / "x.tar")]) == 65
    said = capsys.readouterr()
    assert "0 images in 1 tar shards, 12 unusable files" in said.out
    assert "nothing in it can be used" in said.err
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:2048])
    assert main(["data", "check", str(tmp_path / "x.tar")]) == 65
    assert "is no whole tar file" in capsys.readouterr().err
    assert main(["data", "check", str(animals), "--processes", "0"]) == 64
