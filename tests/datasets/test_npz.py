"""Files of images in ADM's layout: written from a stream, whole or not at all, and read in blocks."""

import errno
import hashlib
import io
import os
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from subprocess import PIPE

import numpy as np
import pytest

from smalti.data.npz import open_npz_images, write_images
from smalti.data.npz_file import NpzFile
from smalti.errors import DataError, StorageError
from smalti.storage.filesystem import LocalFileSystem
from smalti.storage.process import Process


def pixels(count=10, rows=6, columns=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, rows, columns, 3), dtype=np.uint8)


def in_pieces(images, sizes):
    return np.split(images, np.cumsum(sizes)[:-1])


# Writing


def test_numpy_reads_what_was_written_and_the_record_is_that_of_the_file(tmp_path):
    images, path = pixels(), tmp_path / "new" / "samples.npz"
    record = write_images(path, in_pieces(images, [3, 0, 7]), count=10, image_size=(6, 4), class_labels=range(10))
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["arr_1"], np.arange(10))
    data = path.read_bytes()
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert zipfile.ZipFile(path).testzip() is None


def test_bytes_depend_on_the_images_alone_and_not_on_how_they_came(tmp_path):
    images = pixels()
    one = write_images(tmp_path / "a.npz", [images], count=10, image_size=(6, 4))
    other = write_images(tmp_path / "b.npz", in_pieces(images, [1, 9]), count=10, image_size=(6, 4))
    assert one == other
    assert write_images(tmp_path / "c.npz", [images[::-1]], count=10, image_size=(6, 4)) != one
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["arr_0"]


@pytest.mark.parametrize(
    ("pieces", "line"),
    [
        ([pixels(9)], "10 images were announced, 9 came; nothing was written"),
        ([pixels(9), pixels(2)], "10 images were announced, more than that came"),
        ([pixels(4), pixels(6, 4, 6)], r"expected images as uint8 \(B, 6, 4, 3\), got uint8 \(6, 4, 6, 3\) at image 4"),
        ([pixels(10).astype(np.float32)], r"got float32 \(10, 6, 4, 3\) at image 0"),
        ([pixels(10).transpose(0, 3, 1, 2)], r"got uint8 \(10, 3, 6, 4\)"),
    ],
)
def test_wrong_images_leave_nothing_behind_and_an_older_file_as_it_was(tmp_path, pieces, line):
    path = tmp_path / "x.npz"
    path.write_bytes(b"before")
    with pytest.raises(DataError, match=line):
        write_images(path, pieces, count=10, image_size=(6, 4))
    assert os.listdir(tmp_path) == ["x.npz"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("labels", [range(9), [0.5] * 10, [[0]] * 10])
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, labels):
    with pytest.raises(DataError, match="expected 10 class labels"):
        write_images(tmp_path / "x.npz", [pixels()], count=10, image_size=(6, 4), class_labels=labels)
    assert os.listdir(tmp_path) == []


class FullDisk(LocalFileSystem):
    def __init__(self, fails):
        self.fails = fails

    def rename(self, source, target):
        if self.fails == "rename":
            raise OSError(errno.EIO, "Input/output error")
        super().rename(source, target)

    def create(self, path):
        writer = super().create(path)
        if self.fails == "write":

            def write(data):
                raise OSError(errno.ENOSPC, "No space left on device")

            writer.write = write
        return writer


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_a_disk_that_refuses_leaves_nothing_and_says_what_was_needed(tmp_path, fails):
    with pytest.raises(StorageError, match=r"writing x.npz in .* failed: .*; it needs 1,744 bytes"):
        write_images(tmp_path / "x.npz", [pixels()], count=10, image_size=(6, 4), fs=FullDisk(fails))
    assert os.listdir(tmp_path) == []


def test_a_stream_that_does_not_end_is_left_where_it_has_given_too_much(tmp_path):
    stream = iter([pixels()] * 9)
    with pytest.raises(DataError, match="10 images were announced, more than that came"):
        write_images(tmp_path / "x.npz", stream, count=10, image_size=(6, 4))
    assert len(list(stream)) == 7


def test_images_for_which_there_is_no_room_are_not_begun(tmp_path):
    fs = FullDisk("no room")
    fs.free_bytes = lambda folder: 2000  # and 1,744 are needed
    with pytest.raises(StorageError, match=r"x\.npz does not fit into .*: it needs 1,744 bytes and a fifth more"):
        write_images(tmp_path / "x.npz", (), count=10, image_size=(6, 4), fs=fs)


WRITER = "from smalti.storage.process import Process; print(Process.current().token, flush=True); input()"


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER], stdin=PIPE, stdout=PIPE, text=True) as other:
        half = tmp_path / f".x.npz.{other.stdout.readline().strip()}.tmp"
        half.write_bytes(b"half")
        (tmp_path / f".x.npz.{Process.current().token}.tmp").write_bytes(b"half")  # our own, from an earlier try
        write_images(tmp_path / "x.npz", [pixels()], count=10, image_size=(6, 4))
        assert sorted(os.listdir(tmp_path)) == sorted([half.name, "x.npz"])
        other.kill()
    write_images(tmp_path / "x.npz", [pixels()], count=10, image_size=(6, 4))
    assert os.listdir(tmp_path) == ["x.npz"]


# Reading


def everything(source, indices=None, rows=3):
    blocks = list(source.blocks(range(len(source)) if indices is None else indices, rows))
    assert all(len(block) <= rows for block in blocks)
    return np.concatenate(blocks)


@pytest.fixture(params=["ours", "numpy", "compressed"])
def stored(request, tmp_path):
    path, images = tmp_path / f"{request.param}.npz", pixels()
    if request.param == "ours":
        write_images(path, [images], count=10, image_size=(6, 4), class_labels=range(10))
    else:
        (np.savez if request.param == "numpy" else np.savez_compressed)(path, images, np.arange(10))
    return path


def test_images_come_back_in_blocks_in_any_order(stored):
    source = open_npz_images(stored)
    assert (len(source), source.image_size, source.class_labels.tolist()) == (10, (6, 4), list(range(10)))
    np.testing.assert_array_equal(everything(source), pixels())
    for chosen in ([3, 4, 5, 9], [9, 0, 0, 5, 4, 3, 8], []):
        blocks = list(source.blocks(chosen, 3))
        assert sum(map(len, blocks)) == len(chosen)
        if chosen:
            np.testing.assert_array_equal(np.concatenate(blocks), pixels()[chosen])


def test_fingerprint_is_that_of_the_pixels_and_their_order(stored, tmp_path):
    write_images(tmp_path / "again.npz", [pixels()], count=10, image_size=(6, 4))
    write_images(tmp_path / "turned.npz", [pixels()[::-1]], count=10, image_size=(6, 4))
    assert open_npz_images(stored).fingerprint == open_npz_images(tmp_path / "again.npz").fingerprint
    assert open_npz_images(stored).fingerprint != open_npz_images(tmp_path / "turned.npz").fingerprint


def test_another_key_can_be_named(tmp_path):
    np.savez(tmp_path / "x.npz", images=pixels(), arr_1=np.arange(10))
    source = open_npz_images(tmp_path / "x.npz", "images")
    np.testing.assert_array_equal(everything(source), pixels())
    assert source.class_labels is None


@pytest.mark.parametrize("labels", [np.zeros(10), np.zeros(4, np.int64)])
def test_what_is_no_label_of_each_image_is_left_out_with_a_note(tmp_path, labels):
    np.savez(tmp_path / "x.npz", pixels(), labels)
    source = open_npz_images(tmp_path / "x.npz")
    assert source.class_labels is None
    assert source.notes == (f"arr_1 is {labels.dtype} {labels.shape}, no labels of 10 images; left out",)


CHANNELS_FIRST = np.ascontiguousarray(pixels().transpose(0, 3, 1, 2))
LAYOUT = r"; ADM's layout is arr_0, uint8 \(N, H, W, 3\), RGB$"


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"images": pixels(), "labels": np.arange(10)}, r"has no array 'arr_0'; its keys are: images, labels$"),
        ({}, r"has no array 'arr_0'; its keys are: none$"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"statistics of images \(mu, sigma\) and no images; .*reference"),
        ({"arr_0": pixels() / 255}, r"arr_0 is float64 \(10, 6, 4, 3\): floats, whose range is unknown: .*" + LAYOUT),
        ({"arr_0": pixels().astype(int)}, r"int64 \(10, 6, 4, 3\): not 8 bits for each colour" + ".*" + LAYOUT),
        ({"arr_0": CHANNELS_FIRST}, r"channels come first: transpose to \(N, H, W, 3\)" + LAYOUT),
        ({"arr_0": CHANNELS_FIRST / 255}, r"floats, whose range is unknown: .* as uint8; channels come first"),
        ({"arr_0": pixels()[..., 0]}, r"uint8 \(10, 6, 4\): grey images; .*repeat grey three times.*" + LAYOUT),
        ({"arr_0": pixels()[..., :1]}, r"grey images"),
        ({"arr_0": pixels()[:, None, :, :, 0]}, r"grey images"),
        ({"arr_0": np.zeros((2, 5, 6, 4), np.uint8)}, r"four channels: put the images on a background"),
        ({"arr_0": np.zeros((2, 5, 6, 7), np.uint8)}, r"not three channels"),
        ({"arr_0": np.zeros((2, 5), np.uint8)}, r"an array of 2 dimensions holds no images"),
        ({"arr_0": pixels()[:0]}, r"uint8 \(0, 6, 4, 3\): there is no image in it"),
        ({"arr_0": np.asfortranarray(pixels())}, r"Fortran order"),
        ({"arr_0": np.array([{}, "x"], dtype=object)}, r"arr_0 holds pickled Python objects, which are never read"),
        ({"arr_0": np.zeros(3, dtype=[("名", "u1")])}, r"damaged or cannot be read"),
    ],
)
def test_what_is_no_file_of_images_is_refused_in_one_line(tmp_path, arrays, line):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's own, on the name of a field
        np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=line) as caught:
        open_npz_images(tmp_path / "x.npz")
    assert "\n" not in str(caught.value)


def test_a_row_of_pixels_is_an_image_and_not_grey(tmp_path):
    np.savez(tmp_path / "x.npz", pixels(rows=1))
    assert open_npz_images(tmp_path / "x.npz").image_size == (1, 4)


def test_missing_files_and_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_npz_images(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"is no .npz file"):
        open_npz_images(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("arr_0.npy", b"1" * 100)
    with pytest.raises(DataError, match="compressed in a way that numpy does not use"):
        open_npz_images(tmp_path / "y.npz")


def with_header(path, shape, data, compression=zipfile.ZIP_STORED):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + data)


@pytest.mark.parametrize("shape", [(1 << 40, 6, 4, 3), (11, 6, 4, 3), (9, 6, 4, 3), (-1, 6, 4, 3), (-10, 6, -4, 3)])
def test_an_array_that_claims_other_bytes_than_it_has_is_refused(tmp_path, shape):
    with_header(tmp_path / "x.npz", shape, pixels().tobytes())
    with pytest.raises(DataError, match=r"arr_0 claims to be uint8 .* and has 720; the file is damaged"):
        open_npz_images(tmp_path / "x.npz")


def test_an_array_that_may_not_be_so_large_is_not_read(tmp_path):
    with_header(tmp_path / "x.npz", (10, 6, 4, 3), pixels().tobytes())
    file = NpzFile(tmp_path / "x.npz")
    assert file.read("arr_0", limit=720).size == 720
    with pytest.raises(DataError, match=r"arr_0 is uint8 \(10, 6, 4, 3\), 720 bytes, and at most 719 make sense"):
        file.read("arr_0", limit=719)


def test_an_archive_that_claims_more_than_its_bytes_can_hold_is_refused_before_room_is_made(tmp_path):
    path = tmp_path / "x.npz"
    # The sizes claimed in the directory: of the array, and of what is stored of it.
    for compression, places in (
        (zipfile.ZIP_STORED, [24]),
        (zipfile.ZIP_DEFLATED, [24]),
        (zipfile.ZIP_STORED, [20, 24]),
        (zipfile.ZIP_DEFLATED, [20, 24]),
    ):
        with_header(path, (10, 6, 4, 3), pixels().tobytes(), compression)
        data = bytearray(path.read_bytes())
        for at in (data.index(b"PK\1\2") + place for place in places):
            data[at : at + 4] = (0x7FFFFFFF).to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"arr_0 claims 2,147,483,647 bytes, more than its .* can hold"):
            open_npz_images(path)


def test_no_flipped_bit_of_the_file_is_more_than_one_line_and_none_of_the_pixels_stays_unseen(stored, tmp_path):
    whole, path = stored.read_bytes(), tmp_path / "flipped.npz"
    right = open_npz_images(stored).fingerprint
    outcomes, lines = {"same": 0, "refused": 0}, set()
    for at in range(0, len(whole), 3):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            source = open_npz_images(path)
            found = source.fingerprint
            everything(source)
        except DataError as error:
            lines.add(str(error).count("\n"))
            outcomes["refused"] += 1
        else:
            # A time stamp, an attribute, or a shape of as many pixels: never other pixels of the same shape.
            assert found == right or source.header.shape != (10, 6, 4, 3)
            outcomes["same"] += 1
    assert outcomes["refused"] > outcomes["same"]
    assert lines == {0}


def test_a_file_that_shrinks_while_it_is_read_is_refused(stored):
    source = open_npz_images(stored)
    os.truncate(stored, 400)
    with pytest.raises(DataError, match=r"ends in the middle|damaged or cannot be read"):
        everything(source)


def test_blocks_of_a_large_file_need_no_memory_for_the_rest(tmp_path):
    piece = np.zeros((64, 32, 32, 3), np.uint8)
    count = 64 * 160  # 31 MB
    for write in ("stored", "deflated"):
        path = tmp_path / f"{write}.npz"
        if write == "stored":
            tracemalloc.start()
            write_images(path, (piece for _ in range(160)), count=count, image_size=(32, 32))
        else:
            np.savez_compressed(path, np.zeros((count, 32, 32, 3), np.uint8))
            tracemalloc.start()
        source = open_npz_images(path)
        assert source.fingerprint
        assert sum(len(block) for block in source.blocks(range(count), 64)) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Pieces of 4 MiB, one being read while another is hashed or inflated.
        assert peak < 15 << 20
