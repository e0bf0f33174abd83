"""The rows of the failure table on data, each as one countable list."""

import io
import os
import struct
import tarfile
import time
import zlib

import numpy as np
import pytest
from bad_images import REFUSED, png, png_chunk, saved
from PIL import Image

from smalti.data import SampleOrder, load_batch, load_image_set, split
from smalti.data.decoding import UnusableImageError, decode
from smalti.data.folder import load_folder
from smalti.data.folder_pass import index_folder
from smalti.data.shards import load_shards
from smalti.errors import DataError

pytestmark = pytest.mark.faults


def good(value):
    return saved(Image.new("RGB", (8, 8), (value, 0, 0)))


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# Bad images: at least 20 kinds


BAD = {f"bad {kind}.png": make for kind, (make, _) in REFUSED.items()}


def test_there_are_at_least_twenty_kinds_of_bad_image():
    assert len(REFUSED) >= 20


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "shard"])
def test_every_kind_is_named_with_its_reason_and_the_rest_is_as_without_them(tmp_path, packed):
    fine = {f"{i}.png": good(i) for i in range(6)}
    both = fine | {name: make() for name, make in BAD.items()}
    if packed:
        whole, mixed = pack(tmp_path / "fine.tar", fine), pack(tmp_path / "mixed.tar", both)
    else:
        whole, mixed = write(tmp_path / "fine", fine), write(tmp_path / "mixed", both)
    with pytest.raises(DataError, match=f"{len(BAD)} of {len(both)} files cannot be used"):
        load_image_set(mixed)
    kept, expected = load_image_set(mixed, skip_unreadable=True), load_image_set(whole)
    assert [name.rpartition(":")[2] for name in kept.item_names] == list(fine)
    assert kept.fingerprint == expected.fingerprint
    for i in range(6):
        assert kept.read(i).tolist() == expected.read(i).tolist()
    rejected = kept.shards[0].rejected if packed else kept.index.rejected
    reasons = {r.path: r.reason for r in rejected}
    assert reasons.keys() == BAD.keys()
    for kind, (_, reason) in REFUSED.items():
        assert reason in reasons[f"bad {kind}.png"]
        assert "\n" not in reasons[f"bad {kind}.png"]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_goes_bad_under_a_run_is_replaced_the_same_way_each_time(tmp_path, kind):
    root = write(tmp_path / "set", {f"{i}.png": good(i) for i in range(10)})
    order = SampleOrder(range(10), seed=2)
    replacement = next(r for attempt in range(9) if (r := order.replacement(3, attempt)) != 3)
    before = load_batch(load_folder(root, None, cache_bytes=0), order, range(10), flip=False, seed=0)
    images = [load_folder(root, None, cache_bytes=0) for _ in range(2)]
    (root / "3.png").write_bytes(REFUSED[kind][0]())
    for image_set in images:
        image_set._tally.reads = 10_000  # one bad file among many
        after = load_batch(image_set, order, range(10), flip=False, seed=0)
        expected = [replacement if i == 3 else i for i in before.indices.tolist()]
        assert after.indices.tolist() == expected
        others = after.indices == before.indices
        assert others.sum() == 9
        assert (after.images[others] == before.images[others]).all()


def test_every_changed_file_is_noticed_100_of_100(tmp_path):
    root = write(tmp_path / "set", {f"{i:03}.png": good(i) for i in range(100)})
    images = load_folder(root, None, cache_bytes=0)
    for i in range(100):
        path = root / f"{i:03}.png"
        match i % 4:
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(good(i + 1) + b" ")
            case 2:
                os.utime(path, ns=(0, 0))
            case 3:
                path.unlink()
                path.write_bytes(good((i + 1) % 256))
    noticed = 0
    for i in range(100):
        images._tally.failures = 0
        with pytest.raises(DataError, match=f"'{i:03}.png'"):
            images.read(i)
        noticed += 1
    assert noticed == 100


# Odd images with a meaning: 12 of 12 pixels as they should be, or refused


def grey16(values):
    return saved(Image.fromarray(np.asarray([values], dtype=np.uint16)))


def turned():
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    return saved(image, "PNG", exif=exif)


def palette():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return saved(image)


def colour16():
    row = b"\0" + struct.pack(">3H", 257 * 7, 257 * 70, 257 * 200)
    return png(1, 1, 16, 2, zlib.compress(row))


def transparent_colour():
    return png(1, 1, 8, 2, zlib.compress(b"\0\x05\x06\x07"), png_chunk(b"tRNS", struct.pack(">3H", 5, 6, 7)))


def animation():
    frames = [Image.new("RGB", (1, 1), (0, 0, 255)), Image.new("RGB", (1, 1), (255, 0, 0))]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


GOLDENS = {
    "grey": (lambda: saved(Image.new("L", (1, 1), 77)), [[(77, 77, 77)]]),
    "one bit": (lambda: saved(Image.new("1", (1, 1), 1)), [[(255, 255, 255)]]),
    "palette": (palette, [[(10, 20, 30)]]),
    "alpha 0": (lambda: saved(Image.new("RGBA", (1, 1), (9, 9, 9, 0))), [[(255, 255, 255)]]),
    "alpha 51": (lambda: saved(Image.new("RGBA", (1, 1), (0, 0, 0, 51))), [[(204, 204, 204)]]),
    "grey with alpha": (lambda: saved(Image.new("LA", (1, 1), (40, 255))), [[(40, 40, 40)]]),
    "transparent colour": (transparent_colour, [[(255, 255, 255)]]),
    "16-bit grey": (lambda: grey16([0, 257 * 100, 65535]), [[(0, 0, 0), (100, 100, 100), (255, 255, 255)]]),
    "16-bit colour": (colour16, [[(7, 70, 200)]]),
    "CMYK": (lambda: saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), [[(0, 255, 255)] * 8] * 8),
    "turned": (turned, [[(0, 0, 0)], [(255, 255, 255)]]),
    "animated": (animation, [[(0, 0, 255)]]),
    "float": (lambda: saved(Image.new("F", (1, 1), 0.5), "TIFF"), "float pixels"),
}


@pytest.mark.parametrize("kind", GOLDENS)
def test_odd_images_give_the_pixels_that_they_mean_or_are_refused(kind):
    make, expected = GOLDENS[kind]
    if isinstance(expected, str):
        with pytest.raises(UnusableImageError, match=expected):
            decode(make())
        return
    found = np.asarray(decode(make()).image).astype(int)
    assert found.shape == np.asarray(expected).shape
    assert np.abs(found - np.asarray(expected)).max() <= 1


def test_there_are_twelve_goldens_beside_the_refused_one():
    assert len(GOLDENS) == 12 + 1


# Classes: 6 of 6 problems named


def cats_and_dogs(root):
    return write(
        root, {f"{name}/{i}.png": good(20 * n + i) for n, name in enumerate(("cats", "dogs")) for i in range(6)}
    )


CLASS_PROBLEMS = {
    "empty": ({"ants/": None}, "no image in class folder 'ants'"),
    "all broken": ({"ants/x.png": b"x"}, r"1 of 13 files cannot be used \('ants/x.png'"),
    "case": ({"Cats/x.png": good(99)}, "class folders 'Cats' and 'cats' differ only by case"),
    "accents": ({"caf\u00e9/x.png": good(98), "cafe\u0301/x.png": good(99)}, "differ only by case or accents"),
    "beside the classes": ({"x.png": good(99)}, "1 images lie beside the class folders, such as 'x.png'"),
    "in validation only": ({"ants/x.png": good(99)}, r"1 classes have no image left to train on \('ants'\)"),
}


@pytest.mark.parametrize("problem", CLASS_PROBLEMS)
def test_every_problem_with_classes_is_named(tmp_path, problem):
    files, message = CLASS_PROBLEMS[problem]
    root = cats_and_dogs(tmp_path / "set")
    for name, data in files.items():
        if data is None:
            (root / name).mkdir()
        else:
            write(root, {name: data})

    def load():
        images = load_image_set(root)
        for seed in range(99):  # some seed sets the only ant aside
            split(images, 0.2, seed)

    with pytest.raises(DataError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


def test_there_are_six_problems_with_classes():
    assert len(CLASS_PROBLEMS) == 6


# Many files


@pytest.mark.long
def test_a_hundred_thousand_entries_are_walked_and_reported_in_ten_seconds(tmp_path):
    root = write(tmp_path / "set", {f"{i}.png": good(i) for i in range(3)})
    (root / "texts").mkdir()
    (root / "texts" / "0.txt").write_text("no image")
    for i in range(1, 100_000):
        if i % 50_000 == 0:
            (root / "texts" / f"{i}.txt").write_text("no image")
        else:
            os.link(root / "texts" / f"{i // 50_000 * 50_000}.txt", root / "texts" / f"{i}.txt")
    started = time.process_time()
    index = index_folder(root)
    assert time.process_time() - started < 10
    assert len(index.entries) == 3
    assert len(index.rejected) == 100_000


def test_shards_and_folders_of_the_same_images_split_alike(tmp_path):
    files = {f"{c}/{i}.png": good(40 * n + i) for n, c in enumerate("ab") for i in range(20)}
    folder, shard = load_image_set(write(tmp_path / "set", files)), load_shards(pack(tmp_path / "set.tar", files), None)
    sides = [split(images, 0.25, 3) for images in (folder, shard)]
    held = [
        sorted(images.split_names[i] for i in s.validation) for images, s in zip((folder, shard), sides, strict=True)
    ]
    assert held[0] == held[1]
