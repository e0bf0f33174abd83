"""Files of images in ADM's layout: written from a stream, whole or not at all, and read in blocks."""

import errno
import hashlib
import os
import platform
import subprocess
import zipfile

import numpy as np
import pytest

from smalti.data.npz import write_images
from smalti.errors import DataError, StorageError
from smalti.storage.filesystem import LocalFileSystem


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


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    node = platform.node()
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = ended.pid
    left, living = tmp_path / f".x.npz.{node}-{dead}.tmp", tmp_path / f".x.npz.{node}-{os.getppid()}.tmp"
    left.write_bytes(b"half")
    living.write_bytes(b"half")
    (tmp_path / f".x.npz.{node}-{os.getpid()}.tmp").write_bytes(b"half")
    write_images(tmp_path / "x.npz", [pixels()], count=10, image_size=(6, 4))
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, "x.npz"])
