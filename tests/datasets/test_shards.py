"""Tar shards: what examples they give, what is refused by name, and that no cut stays unseen."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time

import fsspec
import numpy as np
import pytest
from PIL import Image

from smalti.data import SampleOrder, index_file, load_batch, load_image_set, open_images, split
from smalti.data import shards as shards_module
from smalti.data.changed import ChangedFileError
from smalti.data.index_file import PackedNames, index_bytes, parse_index
from smalti.data.order import BlockOrder, training_order
from smalti.data.shard_index import index_shard, stored
from smalti.data.shard_place import expand_braces, find_shards, is_shards
from smalti.data.shards import BESIDE, index_path, index_shards, load_shards
from smalti.data.tar_file import DamagedTarError, walk_members
from smalti.errors import ConfigError, DataError, SmaltiError
from smalti.storage.objects import LocalStore, open_store


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(value=0, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path, members, **options):
    """A shard of (name, bytes) or TarInfo members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                name, data = member
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def labelled(values):
    return [part for v in values for part in ((f"{v:05}.png", png(v)), (f"{v:05}.cls", str(v % 3).encode()))]


@pytest.fixture
def shards(tmp_path):
    """Two shards of 6 images each, labels 0 to 2."""
    tar(tmp_path / "shards" / "train-000000.tar", labelled(range(6)))
    tar(tmp_path / "shards" / "train-000001.tar", labelled(range(6, 12)))
    return tmp_path / "shards"


def test_a_folder_of_shards_is_an_image_set(shards):
    images = load_image_set(shards)
    assert (images.name, images.image_size, len(images)) == ("shards", (8, 8), 12)
    assert images.class_names == ("0", "1", "2")
    assert images.class_labels.tolist() == [i % 3 for i in range(12)]
    assert images.class_labels.dtype == np.int64
    assert images.item_names[7] == "train-000001.tar:00007.png"
    assert list(images.item_names)[-1] == images.item_names[-1] == "train-000001.tar:00011.png"
    assert images.split_names[7] == "00007"
    for i in (0, 5, 6, 11):
        assert images.read(i).tolist() == np.full((8, 8, 3), (i, 0, 7)).tolist()
    assert load_image_set(shards, 4).read(3).shape == (4, 4, 3)
    parts = split(images, 0.25, 0)
    batch = load_batch(images, SampleOrder(parts.train, 0), range(9), flip=False, seed=0)
    assert batch.class_labels.tolist() == [i % 3 for i in batch.indices.tolist()]


@pytest.mark.parametrize("layout", ["pattern", "glob", "file url", "memory", "one by one"])
def test_shards_are_found_by_pattern_and_by_url(shards, layout):
    expected = load_image_set(shards)
    match layout:
        case "pattern":
            spec = f"{shards}/train-{{000000..000001}}.tar"
        case "glob":
            spec = f"{shards}/train-*.tar"
        case "file url":
            spec = f"file://{shards}"
        case "memory":
            fs = fsspec.filesystem("memory")
            for path in shards.iterdir():
                fs.pipe(f"/far/{path.name}", path.read_bytes())
            spec = "memory://far"
        case "one by one":
            spec = f"{shards}/{{train-000000,train-000001}}.tar"
    images = load_image_set(spec)
    assert images.fingerprint == expected.fingerprint
    assert images.read(8).tolist() == expected.read(8).tolist()
    assert images.wants_blocks == (layout == "memory")
    assert type(training_order(images, range(12), 0)) is (BlockOrder if layout == "memory" else SampleOrder)


def test_a_single_shard_and_missing_ones(shards):
    assert len(load_image_set(f"{shards}/train-000001.tar")) == 6
    with pytest.raises(DataError, match=r"there is no file 'train-000002\.tar'"):
        load_image_set(f"{shards}/train-{{000000..000002}}.tar")
    with pytest.raises(DataError, match="no shard fits 'test-"):
        load_image_set(f"{shards}/test-*.tar")
    with pytest.raises(DataError, match=r"compressed shards .* unpack"):
        load_image_set(f"{shards}/train-000000.tar.gz")
    with pytest.raises(ConfigError, match="cannot be listed; name the files"):
        load_image_set("https://localhost/shards")
    with pytest.raises(DataError, match="no tar shard in it"):
        find_shards(LocalStore(shards.parent).place + "/")


def test_braces_are_spelled_out_as_a_shell_does():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}-{1..2}.tar") == ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for wrong in ("{0..9999999}", "{5..1}", "{0..999}{0..9999}"):
        with pytest.raises(DataError, match="shards; expected 1 to"):
            expand_braces(wrong)


def test_each_shard_counts_once_in_order_of_name_and_hidden_ones_and_class_folders_are_none(shards):
    names = ("train-000000.tar", "train-000001.tar")
    assert find_shards(f"{shards}/train-{{000001,000000,000001}}.tar")[1] == names
    (shards / ".train-000002.tar").touch()
    assert find_shards(shards)[1] == names
    (shards / "cats").mkdir()
    assert not is_shards(shards)


def test_a_folder_of_images_with_a_forgotten_archive_stays_a_folder_of_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    tar(tmp_path / "old.tar", labelled([1]))
    assert load_image_set(tmp_path).item_names == ("a.png",)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_survive_every_kind_of_tar(tmp_path, form):
    names = ["a" * 90 + "/" + "b" * 90 + ".png", "größe.png", "new\nline.png", "./dotted.png", "x.v2.final.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["c" * 300 + ".png", "d" * 120 + "/" + "e" * 200 + ".png"]
    path = tar(tmp_path / "x.tar", [(name, png(i)) for i, name in enumerate(names)], format=form)
    found = list(walk_members(LocalStore(tmp_path), path.name))
    assert [member.path for member in found] == [name.removeprefix("./") for name in names]
    for i, member in enumerate(found):
        assert path.read_bytes()[member.offset : member.offset + member.size] == member.data == png(i)


def test_what_tar_itself_makes_is_read_the_same(tmp_path):
    for i in range(5):
        folder = tmp_path / "in" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png(i))
    subprocess.run(["tar", "-cf", tmp_path / "out.tar", "-C", tmp_path / "in", "."], check=True)
    images, folder = load_image_set(tmp_path / "out.tar"), load_image_set(tmp_path / "in")
    assert images.class_names == folder.class_names == ("class0", "class1")
    assert sorted(images.split_names) == sorted(folder.split_names), "packing a folder leaves its split as it is"
    assert images.class_labels.tolist() == [int(name[5]) for name in images.split_names]


@pytest.mark.faults
def test_what_a_header_says_of_one_member_is_not_said_of_the_next(tmp_path):
    sparse, linked, long, last = (tarfile.TarInfo(f"{name}.png") for name in ("sparse", "linked", "long", "last"))
    sparse.pax_headers = {"GNU.sparse.major": "1"}
    linked.type, linked.linkname = tarfile.SYMTYPE, "t" * 200
    long.size, long.pax_headers = 3, {"size": "700", "path": "renamed.png"}
    last.size = 4
    parts = [sparse.tobuf(tarfile.PAX_FORMAT), linked.tobuf(tarfile.GNU_FORMAT)]
    parts += [long.tobuf(tarfile.PAX_FORMAT), b"a" * 700 + bytes(324), last.tobuf(), b"last" + bytes(508), bytes(1024)]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    members = list(walk_members(LocalStore(tmp_path), "x.tar"))
    assert [(m.path, m.size, m.refused) for m in members] == [
        ("sparse.png", 0, "sparse file, not a file"),
        ("linked.png", 0, "symbolic link, not a file"),
        ("renamed.png", 700, ""),
        ("last.png", 4, ""),
    ]
    assert members[-1].data == b"last"


@pytest.mark.faults
def test_a_header_that_renames_all_members_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "all.png"}) as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DamagedTarError, match="a header that renames all members"):
        list(walk_members(LocalStore(tmp_path), "x.tar"))


def binary_size(info, size):
    """The head of a member whose size is written as a number of 11 bytes, as sizes above 8 GiB are."""
    head = bytearray(info.tobuf())
    head[124:136] = b"\x80" + size.to_bytes(11, "big")
    head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 8 * 32)
    return bytes(head)


@pytest.mark.faults
def test_members_and_headers_of_any_size_are_passed_over_or_refused_without_being_read(tmp_path):
    path, member = tmp_path / "x.tar", tarfile.TarInfo("a.png")
    path.write_bytes(binary_size(member, 3) + b"abc".ljust(512, b"\0") + bytes(1024))
    assert [m.data for m in walk_members(LocalStore(tmp_path), "x.tar")] == [b"abc"]
    huge = (1 << 29) + 512
    path.write_bytes(binary_size(member, huge))
    os.truncate(path, 512 + huge + 1024)  # of holes
    assert [(m.refused, m.data) for m in walk_members(LocalStore(tmp_path), "x.tar")] == [
        ("536871424 bytes; more than 512 MiB is refused", None)
    ]
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = b"L", (1 << 20) + 1
    path.write_bytes(name.tobuf())
    os.truncate(path, 1 << 22)
    with pytest.raises(DamagedTarError, match=r"a name or header of 1,048,577 bytes"):
        list(walk_members(LocalStore(tmp_path), "x.tar"))


# Labels


@pytest.mark.parametrize(
    ("members", "names", "labels"),
    [
        ([("a.png", png(1)), ("b.png", png(2))], (), []),
        ([("a.png", png(1)), ("a.json", b'{"label": 1}'), ("b.png", png(2)), ("b.json", b'{"label": 0}')],
         "01", [1, 0]),
        ([("a.png", png(1)), ("a.json", b'{"class": "owl"}'), ("b.png", png(2)), ("b.json", b'{"class": "cat"}')],
         ("cat", "owl"), [1, 0]),
        ([("z/a.png", png(1)), ("z/a.json", b'{"caption": "a"}'), ("y/b.png", png(2))], ("y", "z"), [1, 0]),
        ([("a.png", png(1)), ("a.cls", b"0\n"), ("a.json", b'{"label": 0, "class": 7}')], "0", [0]),
        ([("a.cls", b"0"), ("a.mask.png", png(3)), ("a.png", png(1)), ("a.txt", b"words")], "0", [0]),
        ([("a.cls", b"0"), ("._a.png", b"of a Mac"), ("a.png", png(1)), (".b/c.png", b"hidden")], "0", [0]),
    ],
)  # fmt: skip
def test_labels_come_as_numbers_names_or_folders(tmp_path, members, names, labels):
    tar(tmp_path / "x.tar", members)
    images = load_image_set(tmp_path / "x.tar")
    assert images.class_names == tuple(names)
    assert images.class_labels.tolist() == labels
    assert images.read(0)[0, 0, 0] == 1


FINE = [("a.png", png(1)), ("a.cls", b"0")]
LABEL_FAULTS = {
    "image without label": ([*FINE, ("b.png", png(2))], r"1 of 2 images have no label, such as 'x.tar:b.png'"),
    "label without image": ([*FINE, ("b.cls", b"0")], r"'x.tar:b.cls': a label without an image"),
    "two images": ([*FINE, ("b.x.png", png(2)), ("b.y.png", png(2))], r"'x.tar:b.x.png': 2 images of the key 'b'"),
    "two labels": (
        [*FINE, ("b.png", png(2)), ("b.cls", b"1"), ("b.json", b'{"label": 0}')],
        "two labels: 1 in 'b.cls'",
    ),
    "no number": ([*FINE, ("b.png", png(2)), ("b.cls", b"cat")], "the label 'cat' in 'b.cls' is no whole number"),
    "negative": ([*FINE, ("b.png", png(2)), ("b.cls", b"-1")], "the label '-1' in 'b.cls'"),
    "huge": ([*FINE, ("b.png", png(2)), ("b.cls", b"123456789")], "the label '123456789'"),
    "no json": ([*FINE, ("b.png", png(2)), ("b.json", b"{")], "'b.json' is no JSON"),
    "deep json": ([*FINE, ("b.png", png(2)), ("b.json", b"[" * 99_999)], "'b.json' is no JSON"),
    "a list": ([*FINE, ("b.png", png(2)), ("b.json", b"[3]")], "holds no record, but list"),
    "a vector": ([*FINE, ("b.png", png(2)), ("b.json", b'{"label": [0, 1]}')], r"the label \[0, 1\] in 'b.json'"),
    "endless json": (
        [*FINE, ("b.png", png(2)), ("b.json", b'{"label": 0}' + b" " * (1 << 20))],
        "'b.json' has 1,048,588 bytes; a label needs fewer than 1,048,576",
    ),
    "true": ([*FINE, ("b.png", png(2)), ("b.json", b'{"label": true}')], "the label True in 'b.json'"),
    "names and numbers": (
        [*FINE, ("b.png", png(2)), ("b.cls", b"0"), ("c.png", png(3)), ("c.json", b'{"label": "owl"}')],
        "1 of 3 images have their label from a name, such as 'x.tar:c.png', where the others have a number",
    ),
    "gap": ([*FINE, ("b.png", png(2)), ("b.cls", b"3")], r"no image of class '1', '2'; add some, or set allow_empty"),
    "case": ([("Cat/a.png", png(1)), ("cat/b.png", png(2))], "'Cat' and 'cat' differ only by case"),
}


@pytest.mark.faults
@pytest.mark.parametrize("fault", LABEL_FAULTS)
def test_labels_that_cannot_be_right_are_named(tmp_path, fault):
    members, message = LABEL_FAULTS[fault]
    tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        load_image_set(tmp_path / "x.tar")
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_an_example_spread_over_two_shards_is_named(tmp_path):
    tar(tmp_path / "s" / "a.tar", [*FINE, ("b.png", png(2))])
    tar(tmp_path / "s" / "b.tar", [("b.cls", b"0"), ("c.png", png(3)), ("c.cls", b"0")])
    with pytest.raises(
        DataError, match=r"'b' is spread over two shards: its image lies in 'a.tar', 'b.cls' in 'b.tar'"
    ):
        load_image_set(tmp_path / "s")


def test_images_that_cannot_be_read_are_listed_and_can_be_left_out(shards):
    tar(shards / "train-000002.tar", [*labelled([20]), ("bad.png", png(3)[:50]), ("bad.cls", b"0"), ("no.png", b"")])
    with pytest.raises(DataError, match="2 of 15 files cannot be used") as caught:
        load_image_set(shards)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == ["  'train-000002.tar"] * 2
    assert len(load_image_set(shards, skip_unreadable=True)) == 13
    with pytest.raises(DataError, match=r"no image in 1 tar shards"):
        load_image_set(tar(shards / "only.tar", [("readme.txt", b"x")]))


@pytest.mark.faults
def test_shards_are_held_against_the_list_of_them(shards):
    def promise(**changes):
        rows = [
            {"url": p.name, "filesize": p.stat().st_size, "nsamples": 6} for p in sorted(shards.glob("train-*.tar"))
        ]
        rows[1] |= changes
        (shards / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": rows}))

    promise()
    assert len(load_image_set(shards)) == 12
    assert len(load_image_set(f"{shards}/train-000000.tar")) == 6, "a part was asked for"
    promise(nsamples=7)
    with pytest.raises(DataError, match=r"'train-000001.tar' has 6 images, index.json says 7"):
        load_image_set(shards)
    promise(filesize=5)
    with pytest.raises(DataError, match=r"'train-000001.tar' has [\d,]+ bytes, index.json says 5; copy it again"):
        load_image_set(shards)
    promise(url="elsewhere/train-000009.tar")
    with pytest.raises(DataError, match=r"1 of 2 shards that index.json lists are missing, such as 'train-000009.tar'"):
        load_image_set(shards)
    promise(url="elsewhere/train-000001.tar")
    assert len(load_image_set(shards)) == 12, "whatever place it was listed for"
    promise(nsamples="many")
    with pytest.raises(DataError, match="expected url, filesize and nsamples"):
        load_image_set(shards)
    (shards / "index.json").write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        load_image_set(shards)
    (shards / "index.json").write_text('{"of": "something else"}')
    assert len(load_image_set(shards)) == 12
    tar(shards / "train-000001.tar", [*labelled(range(6, 11)), ("00011.png", b"x"), ("00011.cls", b"2")])
    promise()
    with pytest.raises(DataError, match=r"1 of 12 files cannot be used \('train-000001.tar:00011.png'"):
        load_image_set(shards)


# Hostile and damaged files


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


HOSTILE = {
    "traversal": ("../evil.png", png(9)),
    "deep traversal": ("a/../../evil.png", png(9)),
    "absolute": ("/tmp/evil.png", png(9)),
    "symbolic link": special("evil.png", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special("evil.png", tarfile.LNKTYPE, "00000.png"),
    "character device": special("evil.png", tarfile.CHRTYPE),
    "block device": special("evil.png", tarfile.BLKTYPE),
    "pipe": special("evil.png", tarfile.FIFOTYPE),
    "unknown kind": special("evil.png", b"Z"),
    "contiguous file": special("evil.png", tarfile.CONTTYPE),
    "duplicate": ("00000.png", png(9)),
    "pickle": ("evil.pyd", b"cos\nsystem\n(S'touch evil'\ntR."),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_refused_by_name_and_nothing_is_written(tmp_path, monkeypatch, kind):
    home = tmp_path / "home" / "deep"
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    member = HOSTILE[kind]
    path = tar(home / "x.tar", [*labelled(range(3)), member, *labelled([3, 4])])
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    name = (member.name if isinstance(member, tarfile.TarInfo) else member[0]).lstrip("/")
    if kind == "pickle":  # no image and no label: of no interest, and never opened
        assert len(load_image_set(path)) == 5
    else:
        with pytest.raises(DataError, match=rf"1 of 6 files cannot be used .*{name}") as caught:
            load_image_set(path)
        assert "\n" not in str(caught.value)
        assert not isinstance(member, tarfile.TarInfo) or "not a file" in str(caught.value)
        assert len(load_image_set(path, skip_unreadable=True)) == 5
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before


def whole_shard(tmp_path, count):
    members = [part for v in range(count) for part in ((f"{v:05}.png", png(v)), (f"{v:05}.cls", b"0"))]
    return tar(tmp_path / "x.tar", members).read_bytes()


def end_of_data(data):
    """Where the two blocks of zeros end; what follows is padding without meaning."""
    end = len(data)
    while data[end - 512 : end] == bytes(512):
        end -= 512
    return end + 1024


@pytest.mark.faults
def test_every_cut_of_a_shard_is_found_200_of_200(tmp_path):
    data = whole_shard(tmp_path, 60)
    end = end_of_data(data)
    cuts = random.Random(0).sample(range(1, end), 100)
    cuts += [512 * n for n in random.Random(1).sample(range(1, end // 512), 100)]  # the ones that other readers miss
    found = 0
    for cut in cuts:
        (tmp_path / "x.tar").write_bytes(data[:cut])
        with pytest.raises(DamagedTarError, match=r"'x.tar' is no whole tar file: .*cut off|single block of zeros"):
            list(walk_members(LocalStore(tmp_path), "x.tar"))
        found += 1
    assert found == 200


@pytest.mark.faults
def test_cut_shards_are_found_through_the_image_set_even_when_it_may_skip(tmp_path):
    data = whole_shard(tmp_path, 8)
    for cut in (0, 512, 1024, len(data) // 2 // 512 * 512, end_of_data(data) - 512):
        (tmp_path / "x.tar").write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"'x.tar'"):
            load_image_set(tmp_path / "x.tar", skip_unreadable=True)


@pytest.mark.faults
def test_every_flipped_bit_of_a_shard_is_found_or_changes_nothing(tmp_path):
    """In a head or in the data of an image; what else there is, is padding."""
    data = whole_shard(tmp_path, 3)
    (tmp_path / "x.tar").write_bytes(data)
    store = LocalStore(tmp_path)
    index = index_shard(store, "x.tar")
    members = list(walk_members(store, "x.tar"))
    contents = [range(member.offset, member.offset + member.size) for member in members]
    heads = {member.offset - 512 + k for member in members for k in range(512) if not 148 <= k < 156}  # sums apart
    whole = load_shards(tmp_path / "x.tar", None, cache_bytes=0)
    draw = random.Random(3)
    for _ in range(100):
        place, bit = draw.randrange(end_of_data(data)), draw.randrange(8)
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        (tmp_path / "x.tar").write_bytes(flipped)
        inside = [i for i in range(3) if index.offset[i] <= place < index.offset[i] + index.size[i]]
        for i in range(3):
            images = load_changed(whole)
            if i in inside:
                with pytest.raises(ChangedFileError, match=f"'x.tar:0000{i}.png': changed since it was checked"):
                    images.read(i)
            else:
                images.read(i)
        try:
            again = stored(index_shard(store, "x.tar"))
        except DamagedTarError:
            continue
        same = [again.columns["digest"].tolist(), [r[:2] for r in again.facts["rejected"]], again.names["paths"].text]
        assert place not in heads
        changed = same != [index.digest.tolist(), [], index.paths.text]
        changed |= again.columns["label"].tolist() != index.label.tolist()
        assert not changed or any(place in content for content in contents)


def load_changed(images):
    import dataclasses

    from smalti.data.changed import Tally

    return dataclasses.replace(images, _tally=Tally())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + data, "more follows after its end"),
        (lambda data: data[: end_of_data(data) - 512] + b"x" * 512 + bytes(512), "single block of zeros"),
        (lambda data: data[:148] + b"0000000\0" + data[156:], "checksum"),
        (lambda data: b"", "cut off inside the head"),
        (lambda data: data[:-1], "no multiple of 512: it was cut off"),
        (lambda data: b"not a tar at all" * 64, "checksum"),
        (lambda data: bytes(1024) + data, "more follows after its end"),
    ],
)
def test_other_damage_is_named(tmp_path, change, message):
    (tmp_path / "x.tar").write_bytes(change(whole_shard(tmp_path, 3)))
    with pytest.raises(DamagedTarError, match=message):
        load_image_set(tmp_path / "x.tar")


@pytest.mark.parametrize("record", ["size=99999999999", "size=-5", "path=../../evil.png", "path=a\0.png", "path="])
def test_extended_headers_cannot_lie(tmp_path, record):
    key, _, value = record.partition("=")
    info = tarfile.TarInfo("a.png")
    info.size, info.pax_headers = len(png(1)), {key: value}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(png(1)))
    with pytest.raises(DataError):
        load_image_set(tmp_path / "x.tar")


@pytest.mark.faults
def test_the_fingerprint_follows_the_names_of_classes(tmp_path):
    found = set()
    for name in ("eagle", "owl"):
        records = [json.dumps({"label": label}).encode() for label in ("ant", name)]
        parts = [("a.png", png(1)), ("a.json", records[0]), ("b.png", png(2)), ("b.json", records[1])]
        images = load_image_set(tar(tmp_path / name / "x.tar", parts))
        assert images.class_labels.tolist() == [0, 1]
        found.add(images.fingerprint)
    assert len(found) == 2


@pytest.mark.faults
def test_the_fingerprint_follows_pixels_names_labels_and_size_and_not_the_place(tmp_path):
    def made(name, values=(1, 2), names="ab", labels=(0, 1)):
        rows = zip(names, values, labels, strict=True)
        parts = [part for n, v, label in rows for part in ((f"{n}.png", png(v)), (f"{n}.cls", b"%d" % label))]
        return tar(tmp_path / name / "x.tar", parts)

    first = load_image_set(made("one")).fingerprint
    assert load_image_set(made("elsewhere")).fingerprint == first
    changed = [made("pixels", values=(1, 3)), made("names", names="ac"), made("labels", labels=(1, 0))]
    others = [load_image_set(path).fingerprint for path in changed]
    others.append(load_image_set(tmp_path / "one", 4).fingerprint)
    assert len({first, *others}) == 5


# Stored indices


def passes(monkeypatch):
    """The names of shards that are looked at from now on."""
    from smalti.data import shards as module

    seen, real = [], module.index_shard
    monkeypatch.setattr(module, "index_shard", lambda store, name: seen.append(name) or real(store, name))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # in this process, where they are counted
    return seen


def test_the_pass_happens_once_and_again_for_changed_shards_alone(shards, monkeypatch):
    seen = passes(monkeypatch)
    first = load_image_set(shards)
    assert seen == ["train-000000.tar", "train-000001.tar"]
    second = load_image_set(shards, 4)
    assert len(seen) == 2
    assert load_image_set(shards).fingerprint == first.fingerprint != second.fingerprint
    tar(shards / "train-000001.tar", labelled(range(20, 26)))
    tar(shards / "train-000002.tar", labelled(range(30, 33)))
    third = load_image_set(shards)
    assert seen[2:] == ["train-000001.tar", "train-000002.tar"]
    assert third.fingerprint != first.fingerprint
    (shards / "train-000002.tar").unlink()
    assert len(load_image_set(shards)) == 12
    assert len(seen) == 4


@pytest.mark.faults
def test_a_shard_that_was_replaced_by_one_of_equal_size_is_looked_at_again(shards):
    store, names = find_shards(shards)
    index_shards(store, names, beside=True)
    size = (shards / names[0]).stat().st_size
    tar(shards / names[0], labelled(range(20, 26)))
    assert (shards / names[0]).stat().st_size == size
    images = load_image_set(shards)
    assert [images.read(i)[0, 0, 0] for i in (0, 6)] == [20, 6]


@pytest.mark.faults
def test_an_index_of_another_shard_is_not_believed(shards, monkeypatch, tmp_path):
    store, names = find_shards(shards)
    index_shards(store, names, beside=True)
    shutil.copy(shards / BESIDE / f"{names[0]}.index", shards / BESIDE / f"{names[1]}.index")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    images = load_image_set(shards)
    assert [images.read(i)[0, 0, 0] for i in (0, 6)] == [0, 6]


@pytest.mark.faults
def test_a_process_that_is_killed_while_it_checks_is_one_line_and_what_was_checked_is_kept(shards, monkeypatch):
    store, names = find_shards(shards)
    real = shards_module.index_shard

    def killed(store, name):
        if name == names[1]:
            deadline = time.monotonic() + 60
            while not index_path(store, names[0]).exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(store, name)

    monkeypatch.setattr(shards_module, "index_shard", killed)
    with pytest.raises(
        SmaltiError, match=r"a process that checked shards was killed; what was checked is kept"
    ) as told:
        index_shards(store, names, processes=2)
    assert "\n" not in str(told.value)
    monkeypatch.setattr(shards_module, "index_shard", real)
    seen = passes(monkeypatch)
    assert len(load_image_set(shards)) == 12
    assert seen == [names[1]]


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other version"])
def test_a_damaged_index_is_made_again(shards, monkeypatch, damage):
    whole = load_image_set(shards)
    seen = passes(monkeypatch)
    path = index_path(LocalStore(shards), "train-000000.tar")
    data = path.read_bytes()
    match damage:
        case "flip":
            for place in range(0, len(data), 37):
                path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
                assert parse_index(path.read_bytes()) is None
        case "cut":
            path.write_bytes(data[:-1])
        case "empty":
            path.write_bytes(b"")
        case "other version":
            found = parse_index(data)
            path.write_bytes(index_bytes(type(found)(found.facts | {"version": 99}, found.columns, found.names)))
    assert load_image_set(shards).fingerprint == whole.fingerprint
    assert seen == ["train-000000.tar"]
    assert path.read_bytes() == data


def test_an_index_beside_the_shards_travels_with_them(shards, tmp_path, monkeypatch):
    store, names = find_shards(shards)
    index_shards(store, names, beside=True)
    assert sorted(p.name for p in (shards / BESIDE).iterdir()) == [f"{name}.index" for name in names]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    fs = fsspec.filesystem("memory")
    for path in (*shards.glob("*.tar"), *(shards / BESIDE).iterdir()):
        fs.pipe(f"/copied/{path.relative_to(shards).as_posix()}", path.read_bytes())
    seen = passes(monkeypatch)
    assert len(load_image_set("memory://copied")) == 12
    assert seen == []
    fs.pipe("/copied/train-000000.tar", tar(tmp_path / "y.tar", labelled(range(99))).read_bytes())
    assert len(load_image_set("memory://copied")) == 105
    assert seen == ["train-000000.tar"]
    with pytest.raises(DataError, match="beside shards of this machine only"):
        index_shards(open_store("memory://copied"), names, beside=True)


def test_several_processes_find_the_same_as_one(shards):
    store, names = find_shards(shards)
    one = [index_bytes(stored(index)) for index in index_shards(store, names, processes=1)]
    for name in names:
        index_path(store, name).unlink()
    done = []
    several = index_shards(store, names, processes=2, progress=lambda *counts: done.append(counts))
    assert [index_bytes(stored(index)) for index in several] == one
    assert done == [(1, 2), (2, 2)]
    for name in names:
        index_path(store, name).unlink()
    (shards / names[1]).write_bytes((shards / names[1]).read_bytes()[:2048])
    with pytest.raises(DamagedTarError, match=r"train-000001\.tar"):
        index_shards(store, names, processes=2)


def test_names_packed_are_the_names(monkeypatch):
    monkeypatch.setattr(index_file, "_AT_ONCE", 4)
    names = ["a", "", "größe", "caf\udce9", "new\nline"] * 3
    packed = PackedNames.joined([PackedNames.of(names[:7]), PackedNames.of([]), PackedNames.of(names[7:])])
    assert list(packed) == names
    assert [packed[i] for i in range(-15, 15)] == names + names
    assert packed[2:5] == names[2:5]
    with pytest.raises(IndexError):
        packed[15]


# Reading


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["remove", "cut", "flip", "replace"])
def test_a_changed_shard_is_noticed_at_every_read_and_replaced_the_same_way(shards, damage):
    load_shards(shards, None)
    images = load_shards(shards, None, cache_bytes=0)  # by the stored index: no shard is open yet
    shard = images.shards[0]
    path = shards / "train-000000.tar"
    data = path.read_bytes()
    at = int(shard.offset[3]) + 20
    match damage:
        case "remove":
            path.unlink()
        case "cut":
            path.write_bytes(data[: at + 3])
        case "flip":
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        case "replace":
            tar(path, labelled(range(100, 106)))
    order = SampleOrder(range(12), seed=1)
    position = next(p for p in range(12) if order.at(p)[1] == 3)
    if damage in ("remove", "replace", "cut"):
        with pytest.raises(ChangedFileError, match=r"'train-000000.tar:00003.png'"):
            images.read(3)
    else:
        batch = load_batch(images, order, [position], flip=False, seed=0)
        wanted = next(r for a in range(99) if (r := order.replacement(3, a)) != 3)
        assert batch.indices.tolist() == [wanted]
        assert images.read(2)[0, 0, 0] == 2
    if damage == "flip":
        with pytest.raises(DataError, match=r"2 of [3-9] reads failed, more than 0.1 %: stopped"):
            images.read(3)


def test_small_sets_stay_in_memory_once_they_were_read(shards):
    images = load_image_set(shards)
    assert images.read(4)[0, 0, 0] == 4
    (shards / "train-000000.tar").unlink()
    assert images.read(4)[0, 0, 0] == 4


def test_images_of_equal_bytes_stay_together_in_a_split(tmp_path):
    members = [(f"{i:03}.png", png(i % 20)) for i in range(40)]
    tar(tmp_path / "s" / "a.tar", members[:25])
    tar(tmp_path / "s" / "b.tar", members[25:])
    images = load_image_set(tmp_path / "s")
    assert [images.split_names[i] for i in range(20)] == [images.split_names[i] for i in range(20, 40)]
    assert len(set(images.split_names)) == 20


def test_a_twin_in_one_shard_takes_all_examples_of_its_key_along(tmp_path):
    """`z` and one `x` are twins; the other `x` has no twin, and must not be held out alone."""
    tar(tmp_path / "s" / "a.tar", [("z.png", png(2)), ("x.png", png(2))])
    tar(tmp_path / "s" / "b.tar", [("x.png", png(1)), ("y.png", png(3))])
    assert list(load_image_set(tmp_path / "s").split_names) == ["z", "z", "z", "y"]


def test_images_that_are_not_square_keep_their_rows_and_columns(tmp_path):
    tar(tmp_path / "x.tar", [(f"{i}.png", png(i, size=(8, 5))) for i in range(3)])
    images = load_image_set(tmp_path / "x.tar")
    assert (images.image_size, images.read(0).shape) == ((5, 8), (5, 8, 3))


def test_blocks_hold_no_more_examples_than_allowed(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK", 4)
    assert load_image_set(shards).block_starts.tolist() == [0, 4, 6, 10]


def test_a_block_that_is_spread_over_a_shard_is_not_fetched_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "BLOCK_BYTES", 2048)
    labels = [(f"{i:02}.cls", b"0") for i in range(40)]
    tar(tmp_path / "x.tar", [*labels, *((f"{i:02}.png", png(i)) for i in reversed(range(40)))])
    fsspec.filesystem("memory").pipe("/spread/x.tar", (tmp_path / "x.tar").read_bytes())
    images = load_shards("memory://spread", None, cache_bytes=0)
    read, asked = images.store.read, []
    monkeypatch.setattr(images.store, "read", lambda name, low, high: asked.append(high - low) or read(name, low, high))
    assert [images.read(i)[0, 0, 0] for i in range(40)] == list(range(40))
    assert max(asked) < 512


def test_shards_can_be_measured_like_any_set(shards):
    whole = open_images(shards)
    assert (whole.count, whole.image_size) == (12, (8, 8))
    assert next(iter(whole.batches(4)))[3, 0, 0, 0] == 3
    held = open_images(f"{shards}#validation(fraction=0.25)")
    assert held.count == 3
    small = open_images(f"{shards}/train-*.tar", image_size=4)
    assert small.image_size == (4, 4)
    assert any("scaled" in note for note in small.notes)
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    tar(shards / "grey.tar", [("g.png", buffer.getvalue()), ("g.cls", b"0")])
    with pytest.raises(DataError, match=r"1 of 13 images are not plain 8-bit RGB: 1 PNG L"):
        open_images(shards)
    assert any("converted" in note for note in open_images(shards, convert=True).notes)


def test_records_of_metadata_do_not_become_labels(tmp_path):
    record = json.dumps({"width": 8, "url": "x"}).encode()
    tar(tmp_path / "x.tar", [("a.png", png(1)), ("a.json", record), ("a.txt", b"a caption")])
    images = load_image_set(tmp_path / "x.tar")
    assert (images.class_names, len(images)) == ((), 1)
