"""Names of large sets in few bytes: what they say is what plain lists of texts say, whatever the names look like."""

import hashlib
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from smalti.data.grouping import equal_rows, is_among, text_digests
from smalti.data.image_set import merge_twins
from smalti.data.index_file import PackedNames, index_bytes, parse_index
from smalti.data.latent_index import read_index
from smalti.data.latent_record import INDEX, LatentIdentity, LatentRecord, StoredFile, index_tensors
from smalti.data.order import split
from smalti.data.shard_index import NUMBER, ShardIndex, compact, restored, stored
from smalti.data.shard_names import KeyNames, ShardNames, SplitNames, key_of
from smalti.data.shards import _split_names
from smalti.errors import DataError
from smalti.latents import CodecFacts
from smalti.storage.objects import LocalStore
from smalti.streams import SPLIT, key

ODD = [
    "a.jpg", "b", "größe.png", "caf\udce9/\udcff.x.jpg", "new\nline/a.b/c.d.e", "日本/語.webp", "dir.with.dots/plain",
    ".hidden", "trailing/", "a/.b", "//", "..",
    "x" * 5000 + "/" + "y" * 3000 + ".jpg", "n01/n01_1.JPEG", "", "é", "\u0000.a",
]  # fmt: skip


def index_of(shard, paths, digests):
    count = len(paths)
    draw = np.random.default_rng(count)
    return ShardIndex(
        shard=shard, version="1", bytes=1 << 33, paths=PackedNames.of(paths),
        keys=PackedNames.of(key_of(path)[0] for path in paths),
        offset=draw.integers(0, 1 << 32, count), size=np.full(count, 77, np.int64),
        crc=draw.integers(0, 1 << 32, count, dtype=np.uint32), digest=np.asarray(digests, np.uint64).reshape(-1, 2),
        image_size=draw.integers(1, 900, (count, 2), dtype=np.int32), source=np.full(count, NUMBER, np.int32),
        label=draw.integers(0, 9, count, dtype=np.int32), label_names=(), kinds=(), notes=(), rejected=(),
    )  # fmt: skip


def many_shards(seed, names=ODD):
    """Shards whose names come several times, as do their contents."""
    draw = random.Random(seed)
    shards = []
    for number in range(4):
        paths = draw.sample(names, draw.randrange(len(names)))
        digests = [(draw.randrange(12), draw.choice([5, 5, 6])) for _ in paths]
        shards.append(index_of(f"größe-{number}.tar", paths, digests))
    return shards


@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_keys_as_views_of_paths_are_the_keys(monkeypatch, at_once):
    monkeypatch.setattr("smalti.data.shard_names._AT_ONCE", at_once)
    packed = PackedNames.of(ODD)
    keys, expected = KeyNames(packed), [key_of(path)[0] for path in ODD]
    assert list(keys) == expected
    assert [keys[i] for i in range(-len(ODD), len(ODD))] == expected * 2
    assert keys.are(PackedNames.of(expected))
    for i in range(len(ODD)):
        assert not keys.are(PackedNames.of([*expected[:i], expected[i] + "x", *expected[i + 1 :]]))
        assert not keys.are(PackedNames.of([*expected[:i], *expected[i + 1 :]]))
    swapped = [expected[0][:-1] + "b", *expected[1:]]
    assert not keys.are(PackedNames.of(swapped)), "as long, and other letters"
    hashes = keys.hashes().tolist()
    for i, one in enumerate(expected):
        for k, other in enumerate(expected):
            assert (hashes[i] == hashes[k]) == (one == other), (one, other)


def test_a_compact_index_is_stored_as_it_was_and_found_again():
    for count in (len(ODD), 1, 0):
        index = index_of("a.tar", ODD[:count], [(i, 1 << 63) for i in range(count)])
        small = compact(index)
        assert index_bytes(stored(small)) == index_bytes(stored(index)) == index_bytes(stored(compact(small)))
        again = restored(parse_index(index_bytes(stored(small))), "a.tar")
        assert (list(again.paths), list(again.keys)) == (list(index.paths), list(index.keys))
        assert np.array_equal(again.offset, index.offset)
    for change in ({"size": small.size + 5}, {"offset": np.asarray([1.5])}):
        assert restored(parse_index(index_bytes(stored(replace(index, **change)))) or stored(index), "b.tar") is None


def test_an_index_whose_keys_are_not_those_of_its_paths_counts_as_none():
    index = index_of("a.tar", ["a.png", "b.png"], [(1, 1), (2, 2)])
    assert restored(stored(index), "a.tar") is not None
    for keys in (["a", "c"], ["b", "a"], ["a", "bb"], ["a"], ["ab", ""]):
        assert restored(stored(replace(index, keys=PackedNames.of(keys))), "a.tar") is None, keys


@pytest.mark.parametrize("seed", range(20))
def test_names_that_splits_go_by_are_those_of_merging_all_texts(seed):
    shards = many_shards(seed)
    keys = [name for shard in shards for name in shard.keys]
    contents = [tuple(row) for shard in shards for row in shard.digest.tolist()]
    expected = merge_twins(keys, contents)
    found = _split_names([compact(shard) for shard in shards])
    assert [found[i] for i in range(len(found))] == list(found) == expected
    assert found[2:5] == expected[2:5]


@pytest.mark.parametrize("seed", range(5))
def test_a_split_by_packed_names_is_the_split_by_sorted_texts(seed):
    class Named:
        name, class_names, class_labels = "made up", (), np.zeros(0, np.int64)

        def __init__(self, names):
            self.split_names = names

    paths = [f"{i % 40}.{i}" for i in range(90)]
    packed = _split_names([compact(index_of("a.tar", paths, [(i % 70, 1) for i in range(90)]))])
    names = list(packed)
    assert 1 < len(set(names)) < 40
    ids = text_digests(names, len(names))[:, 0].tolist()
    ranked = sorted({(key(seed, SPLIT, number), name) for number, name in zip(ids, names, strict=True)})
    for fraction in (0.0, 0.3, 0.7):
        held = {name for _, name in ranked[: round(fraction * len(ranked))]}
        for made in (packed, names):
            sides = split(Named(made), fraction, seed)
            assert sides.validation.tolist() == [i for i, name in enumerate(names) if name in held]
            assert sides.train.tolist() == [i for i, name in enumerate(names) if name not in held]


def test_names_with_one_rank_are_set_aside_in_the_order_of_their_texts(monkeypatch):
    class Named:
        name, class_names, class_labels = "made up", (), np.zeros(0, np.int64)
        split_names = ("d", "b", "a", "b", "c", "a")

    monkeypatch.setattr("smalti.data.order._ranks", lambda digests, seed: np.zeros(len(digests), np.uint64))
    assert split(Named(), 0.5, 0).validation.tolist() == [1, 2, 3, 5]
    assert split(Named(), 0.25, 0).validation.tolist() == [2, 5]


def test_equal_rows_are_found_through_all_parts():
    draw = np.random.default_rng(0)
    for count, most in ((0, 2), (1, 2), (40, 3), (40, 1000), (300, 2)):
        rows = draw.integers(0, most, (count, 2)).astype(np.uint64)
        later, first = equal_rows([rows[:7], rows[7:7], rows[7:]])
        seen = {}
        expected = {i: seen[row] for i, row in enumerate(map(tuple, rows.tolist())) if seen.setdefault(row, i) != i}
        assert dict(zip(later.tolist(), first.tolist(), strict=True)) == expected
        assert len(later) == len(expected)
    assert [part.tolist() for part in equal_rows([])] == [[], []]
    assert is_among(np.asarray([1, 5, 9, 10], np.uint64), np.asarray([5, 9], np.uint64)).tolist() == [0, 1, 1, 0]


def test_item_names_of_shards_are_shard_and_path():
    names = ShardNames(["a.tar", "größe \udce9.tar"], [PackedNames.of(ODD), PackedNames.of(ODD[:2])])
    expected = [f"a.tar:{path}" for path in ODD] + [f"größe \udce9.tar:{path}" for path in ODD[:2]]
    assert list(names) == [names[i] for i in range(len(names))] == expected
    assert list(SplitNames([], np.zeros(0, np.int64), np.zeros(0, np.int64))) == []


def test_texts_must_be_as_many_as_they_were_said_to_be():
    for count in (1, 3):
        with pytest.raises(ValueError, match=r"expected|broadcast"):
            text_digests(["a", "b"], count)


def record_of(folder, data, count):
    identity = LatentIdentity(
        codec=CodecFacts(kind="autoencoder-kl", channels=4, factor=8), source="made up", source_fingerprint="",
        source_count=count, image_size=(8, 8), count=count, flips="stored", chunk_rows=9, batch=4, precision="fp32",
        device="cpu", threads=1, torch="",
    )  # fmt: skip
    (folder / INDEX).write_bytes(data)
    file = StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return LatentRecord(identity=identity, class_names=("a", "b", "c"), smalti="", index=file)


@pytest.mark.parametrize("piece", [8, 64, 1 << 24])
@pytest.mark.parametrize("same", [False, True])
def test_an_index_of_latents_read_in_pieces_is_what_was_written(tmp_path, monkeypatch, piece, same):
    monkeypatch.setattr("smalti.data.latent_index._PIECE", piece)
    count, draw = len(ODD), np.random.default_rng(0)
    splits = ODD if same else [name[:3] for name in ODD]
    images = SimpleNamespace(
        class_names=("a", "b", "c"), class_labels=draw.integers(0, 3, count + 2), item_names=[*ODD, "x", "y"],
        split_names=[*splits, "z", "z"],
    )  # fmt: skip
    checksums = torch.from_numpy(draw.integers(0, 1 << 32, (count, 2)))
    tensors = index_tensors(images, count, checksums)
    assert ("split_names.bytes" in tensors) != same
    record = record_of(tmp_path, save(tensors), count)
    found = read_index(LocalStore(tmp_path), record)
    assert (list(found.item_names), list(found.split_names)) == (ODD, splits)
    assert found.class_labels.tolist() == load(save(tensors))["class_labels"].tolist()
    assert found.crc32.tolist() == checksums.tolist()
    assert (found.class_labels.dtype, found.crc32.dtype) == (np.int64, np.uint32)


def test_an_index_of_latents_that_is_no_such_file_is_damaged_whatever_its_hash(tmp_path):
    whole = save({"a": torch.arange(3), "b": torch.arange(4)})
    head = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    broken = [b"", b"abc", bytes(8), whole[:-1], whole + b"x", (1 << 40).to_bytes(8, "little") + head]
    for old, new in ((b"[3]", b"[4]"), (b"[3]", b"[-3]"), (b"[0,24]", b"[8,32]"), (b"[0,24]", b"[0,]"), (b"{", b"[")):
        assert old in head
        changed = head.replace(old, new)
        broken.append(len(changed).to_bytes(8, "little") + changed + whole[8 + len(head) :])
    for data in broken:
        with pytest.raises(DataError, match=r"index\.safetensors is damaged: (?!its size)"):
            read_index(LocalStore(tmp_path), record_of(tmp_path, data, 3))
    with pytest.raises(DataError, match=r"does not fit latents\.json: class_labels is no table"):
        read_index(LocalStore(tmp_path), record_of(tmp_path, whole, 3))
    record = record_of(tmp_path, whole, 3)
    (tmp_path / INDEX).write_bytes(whole[:-1] + b"x")
    with pytest.raises(DataError, match=r"its size or sha256 is not the one"):
        read_index(LocalStore(tmp_path), record)
