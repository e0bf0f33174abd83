"""Latents of a store, too many to be held: what is asked of it, how much at a time, and that no bit depends on it.

Everything is a quarter of what it is in earnest: posteriors of 4 KiB, blocks of 1 MiB and 128 examples.
"""

import threading
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from smalti.data import latent_set as latent_set_module
from smalti.data import read_ahead as read_ahead_module
from smalti.data.index_file import PackedNames
from smalti.data.latent_index import LatentIndex
from smalti.data.latent_record import LatentIdentity, LatentRecord, StoredFile, chunk_name
from smalti.data.latent_set import LatentExamples, LatentSet
from smalti.data.order import SampleOrder, training_order
from smalti.errors import DataError
from smalti.latents import CodecFacts
from smalti.storage.objects import ByteStore, LocalStore, exactly

COUNT, CHUNK_ROWS, BLOCK_ROWS, OFFSET = 1000, 256, 128, 72
VIEW, ROW, BLOCK = 1 << 12, 1 << 13, 1 << 20
BLOCKS = 8


class CountingStore:
    """Files in memory, and what was asked of them."""

    place = "counted://latents"

    def __init__(self, files):
        self.files, self.asked, self.together = files, [], None

    def read(self, name, start=0, stop=None):
        self.asked.append((name, start, stop))
        if self.together:
            self.together.wait(timeout=60)
        return exactly(self.files[name][start:stop], start, stop, self.place, name)

    def size(self, name):
        return len(self.files[name])

    def version(self, name):
        return f"{self.size(name)}"

    def names(self):
        return sorted(self.files)

    @property
    def bytes(self):
        return sum(stop - start for _, start, stop in self.asked)


@pytest.fixture(scope="module")
def stored():
    """float16 (COUNT, views, 2, 4, 16, 16)."""
    return np.random.default_rng(0).integers(0, 0x7C00, (COUNT, 2, 2, 4, 16, 16), np.uint16).view(np.float16)


@pytest.fixture
def far(stored, monkeypatch):
    monkeypatch.setattr(latent_set_module, "HELD_BYTES", 0)
    monkeypatch.setattr(latent_set_module, "_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(read_ahead_module, "REQUEST_BYTES", read_ahead_module.REQUEST_BYTES // 4)
    chunks = [bytes(OFFSET) + stored[at : at + CHUNK_ROWS].tobytes() for at in range(0, COUNT, CHUNK_ROWS)]
    identity = LatentIdentity(
        codec=CodecFacts(kind="autoencoder-kl", channels=4, factor=8),
        source="far",
        source_count=COUNT,
        image_size=(128, 128),
        source_fingerprint="",
        count=COUNT,
        flips="stored",
        chunk_rows=CHUNK_ROWS,
        batch=1,
        precision="fp32",
        device="cpu",
        threads=1,
        torch="",
    )
    assert (identity.view_bytes, identity.row_bytes, BLOCK // ROW) == (VIEW, ROW, BLOCK_ROWS)
    record = LatentRecord(
        identity=identity,
        class_names=(),
        smalti="",
        index=StoredFile(bytes=0, sha256=""),
        chunks=tuple(StoredFile(bytes=len(chunk), sha256="", offset=OFFSET) for chunk in chunks),
    )
    crc32 = np.array([[zlib.crc32(view) for view in row] for row in stored], np.uint32)
    names = PackedNames.of(())
    store = CountingStore({chunk_name(n): chunk for n, chunk in enumerate(chunks)})
    assert isinstance(store, ByteStore)
    latents = LatentSet(store, record, LatentIndex(np.empty(0, np.int64), crc32, names, names))
    assert latents.wants_blocks
    assert len(latents.block_starts) == BLOCKS
    return latents


def same(found, stored, indices, views):
    return np.array_equal(found.numpy(), stored[indices, views].astype(np.float32))


@pytest.mark.parametrize("nearby", [False, True])
def test_whatever_is_asked_of_a_store_the_bits_are_those_that_were_stored(far, stored, nearby):
    draw = np.random.default_rng(1)
    for count in (1, 2, 60, 400):
        indices, views = draw.integers(0, COUNT, count).tolist(), draw.integers(0, 2, count).tolist()
        assert same(far.moments(indices, views, nearby=nearby), stored, indices, views)


def test_where_a_run_jumps_about_each_example_is_one_range_and_nothing_beside_it_is_fetched(far):
    examples, order = LatentExamples(far, "mean"), training_order(far, np.arange(COUNT), seed=0, shuffle="full")
    for first in range(0, COUNT, 8):
        examples.load(order, range(first, first + 8), flip=True, seed=0)
    # Two of one block that lie next to each other by chance may come together.
    assert 0.9 * COUNT <= len(far.store.asked) <= COUNT
    assert COUNT * VIEW <= far.store.bytes <= 2 * COUNT * VIEW
    assert not far._ahead._held


def test_in_an_order_of_blocks_each_block_is_one_request(far, monkeypatch):
    monkeypatch.setattr(read_ahead_module, "HELD_BYTES", 4 * BLOCK)
    examples = LatentExamples(far, "mean")
    order = training_order(far, np.arange(COUNT), seed=0, window=4)
    near = SampleOrder(np.arange(COUNT), seed=0)
    for first in range(0, COUNT, 50):
        found = examples.load(order, range(first, first + 50), flip=True, seed=0)
        assert found.indices.tolist() != [near.at(position)[1] for position in range(first, first + 50)]
    assert len(far.store.asked) == BLOCKS
    assert far.store.bytes == COUNT * ROW


def test_one_of_many_processes_stops_fetching_blocks_of_which_it_uses_little(far, monkeypatch):
    monkeypatch.setattr(read_ahead_module, "HELD_BYTES", 2 * BLOCK)
    examples, order = LatentExamples(far, "mean"), training_order(far, np.arange(COUNT), seed=0, window=2)
    steps = range(0, 12 * COUNT, 50)
    for first in steps:
        examples.load(order, [first], flip=True, seed=0)
    sizes = Counter(stop - start for _, start, stop in far.store.asked)
    # Of a block three are asked for: 36 KiB each with what a request costs, and the block a MiB. Two blocks are held
    # when this is noticed, and what lies in them goes on to be taken from there.
    assert sum(sizes.values()) - sizes[VIEW] == read_ahead_module._JUDGED_AFTER + 2
    assert sizes[VIEW] > len(steps) / 2


def test_neighbours_that_are_asked_for_at_once_come_by_one_range_of_each_block(far, stored):
    indices = list(range(100, 300))
    assert same(far.moments(indices, [0] * 200), stored, indices, [0] * 200)
    assert sorted(far.store.asked) == [
        (chunk_name(0), OFFSET + 100 * ROW, OFFSET + 127 * ROW + VIEW),
        (chunk_name(0), OFFSET + 128 * ROW, OFFSET + 255 * ROW + VIEW),
        (chunk_name(1), OFFSET, OFFSET + 43 * ROW + VIEW),
    ]


def test_what_is_asked_for_twice_is_fetched_once(far, stored):
    indices, views = [0, 900, BLOCK_ROWS - 1] + [0] * 40, [1, 0, 1] + [1] * 40
    assert same(far.moments(indices, views), stored, indices, views)
    assert far.store.bytes == 3 * VIEW, "nor does it count as many"


@pytest.mark.parametrize("nearby", [False, True])
def test_several_requests_are_under_way_at_a_time(far, nearby):
    far.store.together = threading.Barrier(BLOCKS)  # nothing comes before one thing of each block was asked for
    indices = [number * BLOCK_ROWS + 5 for number in range(BLOCKS)]
    assert far.moments(indices, [0] * BLOCKS, nearby=nearby).shape == (BLOCKS, 2, 4, 16, 16)
    assert len(far.store.asked) == BLOCKS


@pytest.mark.faults
@pytest.mark.parametrize("nearby", [False, True])
def test_one_wrong_byte_among_many_requests_is_noticed_and_not_kept(far, stored, nearby):
    indices = [5, 200, 300, 700]
    name, right = chunk_name(1), far.store.files[chunk_name(1)]
    place = OFFSET + (300 - CHUNK_ROWS) * ROW + 17
    far.store.files[name] = right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :]
    with pytest.raises(DataError, match=r"chunk-00000001.safetensors is damaged \(example 300 is not as it was"):
        far.moments(indices, [0] * 4, nearby=nearby)
    far.store.files[name] = right
    assert same(far.moments(indices, [0] * 4, nearby=nearby), stored, indices, [0] * 4)
    far.store.files[name] = right + b"longer"
    with pytest.raises(DataError, match=r"damaged \(2,097,230 bytes, 2,097,224 were written"):
        LatentSet(*far.__reduce__()[1]).moments(indices, [0] * 4, nearby=nearby)


def test_a_draw_of_the_posterior_is_the_same_from_far_and_from_memory(far, monkeypatch):
    order = training_order(far, np.arange(COUNT), seed=3, window=2)
    found = LatentExamples(far).load(order, range(100), flip=True, seed=3)
    monkeypatch.setattr(latent_set_module, "HELD_BYTES", 1 << 28)
    held = LatentSet(*far.__reduce__()[1])
    assert not held.wants_blocks
    far.store.asked.clear()
    for _ in range(2):
        again = LatentExamples(held).load(order, range(100), flip=True, seed=3)
    assert len(far.store.asked) == len({name for name, _, _ in far.store.asked}), "each chunk is read once"
    assert torch.equal(found.indices, again.indices)
    assert torch.equal(found.x0, again.x0)


@pytest.mark.parametrize("nearby", [False, True])
def test_of_a_folder_of_this_machine_nothing_but_what_is_asked_for_is_read(far, stored, tmp_path, monkeypatch, nearby):
    for name, data in far.store.files.items():
        (tmp_path / name).write_bytes(data)
    local, asked = LocalStore(tmp_path), []
    read = local.read
    monkeypatch.setattr(local, "read", lambda name, *span: asked.append(span[1] - span[0]) or read(name, *span))
    indices = [*range(0, 60, 2), 900]
    found = LatentSet(local, far.record, far._index).moments(indices, [1] * 31, nearby=nearby)
    assert same(found, stored, indices, [1] * 31)
    assert asked == [VIEW] * 31
