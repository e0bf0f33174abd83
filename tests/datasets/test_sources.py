"""Images to be measured: the same from a set, a folder or a file, and refused where a silent change would count."""

import os
import shutil
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from bad_images import png_chunk
from PIL import Image

from smalti.data import load_image_set, split
from smalti.data.npz import write_images
from smalti.data.originals import open_originals
from smalti.data.sources import open_images
from smalti.errors import ConfigError, DataError


def pixels(count=10, rows=8, columns=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, rows, columns, 3), dtype=np.uint8)


def put(folder, images, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / (names[i] if names else f"{i:03d}.png"))
    return folder


def everything(source, **options):
    return torch.cat(list(source.batches(**options)))


def channels_first(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.fixture
def folder(tmp_path):
    return put(tmp_path / "real", pixels())


# What comes out


def test_images_beside_folders_of_classes_are_measured_without_classes(tmp_path):
    for name in ("cats", "dogs"):
        put(tmp_path / "real" / name, pixels(2, seed=len(name)))
    assert open_images(tmp_path / "real").class_labels.tolist() == [0, 0, 1, 1]
    put(tmp_path / "real", pixels(1, seed=9))
    source = open_images(tmp_path / "real")
    assert (source.count, source.class_labels) == (5, None)


def test_a_folder_and_an_npz_of_the_same_images_give_the_same_batches(folder, tmp_path):
    write_images(tmp_path / "x.npz", [pixels()], count=10, image_size=(8, 6), class_labels=[3] * 10)
    for spec, labels in ((folder, None), (tmp_path / "x.npz", [3] * 10)):
        source = open_images(spec)
        assert (source.name, source.count, source.image_size, source.notes) == (spec.name, 10, (8, 6), ())
        assert (None if source.class_labels is None else source.class_labels.tolist()) == labels
        batches = list(source.batches(4))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert all(batch.dtype == torch.uint8 and batch.is_contiguous() for batch in batches)
        assert torch.equal(torch.cat(batches), channels_first(pixels()))
        assert torch.equal(everything(source, rows=2, indices=[7, 0, 7]), channels_first(pixels()[[7, 0, 7]]))
        assert list(source.batches(indices=[])) == []


def test_sets_and_sides_of_a_split_are_known_to_be_real_and_pictures_from_anywhere_are_not(folder, tmp_path):
    write_images(tmp_path / "x.npz", [pixels()], count=10, image_size=(8, 6))
    for spec in ("emoji32", "emoji32#validation", f"{folder}#train"):
        assert open_images(spec).real
    assert open_images("emoji32", image_size=8).real
    for spec in (folder, tmp_path / "x.npz"):
        assert not open_images(spec).real
        assert not open_images(spec, image_size=4).real


def test_more_images_than_are_decoded_ahead_come_in_their_order(tmp_path):
    put(tmp_path / "many", pixels(300))
    assert torch.equal(everything(open_images(tmp_path / "many"), rows=7), channels_first(pixels(300)))


def test_a_reader_that_stops_early_leaves_no_thread_behind(folder):
    before = threading.active_count()
    batches = open_images(folder).batches(1)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_an_image_set_is_a_source(tmp_path):
    source, images = open_images("emoji32"), load_image_set("emoji32")
    assert (source.count, source.image_size, source.fingerprint) == (len(images), (32, 32), images.fingerprint)
    assert source.class_labels.tolist() == images.class_labels.tolist()
    assert torch.equal(everything(source, indices=[5, 1905])[1], channels_first(images.images[1905:])[0])


def test_the_sides_are_those_that_training_splits_into(tmp_path):
    images = load_image_set("emoji32")
    sides = split(images, 0.125, 0)
    for side in ("train", "validation"):
        source, chosen = open_images(f"emoji32#{side}"), getattr(sides, side)
        assert source.count == len(chosen)
        assert source.class_labels.tolist() == images.class_labels[chosen].tolist()
        assert torch.equal(everything(source, indices=[0, 9]), channels_first(images.images[chosen[[0, 9]]]))
    other = open_images("emoji32#validation,seed=3,fraction=0.25")
    assert other.count == len(split(images, 0.25, 3).validation)
    assert other.name == "emoji32#validation,seed=3,fraction=0.25"
    assert open_images("emoji32#validation(seed=3,fraction=0.25)").fingerprint == other.fingerprint
    fingerprints = {open_images(spec).fingerprint for spec in ("emoji32", "emoji32#train", "emoji32#validation")}
    assert len({*fingerprints, other.fingerprint, open_images("emoji32", image_size=16).fingerprint}) == 5


def test_the_sides_of_a_folder_are_those_that_training_splits_into(tmp_path):
    put(tmp_path / "set" / "cats", pixels(20))
    put(tmp_path / "set" / "dogs", pixels(20, seed=1))
    shutil.copy(tmp_path / "set" / "cats" / "003.png", tmp_path / "set" / "dogs" / "zzz.png")  # a twin
    trained = load_image_set(tmp_path / "set")
    source = open_images(f"{tmp_path / 'set'}#validation,fraction=0.3")
    chosen = split(trained, 0.3, 0).validation
    assert open_originals(tmp_path / "set").split_names == trained.split_names
    assert source.class_labels.tolist() == trained.class_labels[chosen].tolist()
    assert torch.equal(everything(source), channels_first(np.stack([trained.read(i) for i in chosen])))


def test_a_folder_whose_name_has_a_number_sign_is_a_folder(tmp_path):
    put(tmp_path / "try#1", pixels())
    assert open_images(tmp_path / "try#1").count == 10


@pytest.mark.parametrize("record", ["sample.json", "sample.yaml"])
def test_samples_come_in_order_of_their_seeds_and_the_overview_is_none_of_them(tmp_path, record):
    names = ["000010.png", "000002.png", "1000000.png", "grid.png"]
    folder = put(tmp_path / "samples", [*pixels(3), *pixels(1, 50, 50)], names)
    (folder / record).write_text("{}")
    assert torch.equal(everything(open_images(folder)), channels_first(pixels(3)[[1, 0, 2]]))
    with pytest.raises(DataError, match="holds samples, which have no split; leave out #train"):
        open_images(f"{folder}#train")
    put(folder, pixels(1), ["2.png"])
    with pytest.raises(DataError, match=r"000002.png and 2.png are of one seed"):
        open_images(folder)


def test_samples_that_were_written_as_npz_only_are_found(tmp_path):
    folder = put(tmp_path / "samples", pixels(1, 50, 50), ["grid.png"])
    (folder / "sample.json").write_text("{}")
    write_images(folder / "samples.npz", [pixels()], count=10, image_size=(8, 6))
    assert torch.equal(everything(open_images(folder)), channels_first(pixels()))


def test_fingerprint_follows_contents_order_and_size_and_not_the_names(folder, tmp_path):
    same = put(tmp_path / "b", pixels(), [f"x{i}.png" for i in range(10)])
    turned = put(tmp_path / "c", pixels()[::-1])
    changed = pixels()
    changed[4, 0, 0, 0] ^= 1
    put(tmp_path / "d", changed)
    first = open_images(folder).fingerprint
    assert open_images(same).fingerprint == first
    others = [open_images(turned), open_images(tmp_path / "d"), open_images(folder, image_size=4)]
    assert len({first, *(source.fingerprint for source in others)}) == 4
    assert open_images(folder, image_size=(8, 6)).fingerprint == first


def test_another_size_is_cropped_as_in_training_and_said(folder, tmp_path):
    write_images(tmp_path / "x.npz", [pixels()], count=10, image_size=(8, 6))
    expected = load_image_set(folder, 4)
    for spec in (folder, tmp_path / "x.npz"):
        source = open_images(spec, image_size=4)
        assert source.image_size == (4, 4)
        assert torch.equal(everything(source), channels_first(np.stack([expected.read(i) for i in range(10)])))
        assert source.notes == (
            "10 of 10 images were scaled and centre-cropped to 4 x 4 pixels, as ADM prepares images",
        )
    packed = everything(open_images("emoji32", image_size=16), indices=[7])
    assert torch.equal(packed, channels_first(load_image_set("emoji32", 16).images[7:8]))


def test_jpeg_files_are_measured_with_a_note(folder):
    Image.fromarray(pixels(1)[0]).save(folder / "z.jpg")
    notes = open_images(folder).notes
    assert notes == ("1 of 11 images are JPEG: JPEG compression changes FID (Parmar et al. 2022, arXiv:2104.11222)",)


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png"):
        root = put(tmp_path / suffix, [])
        Image.fromarray(pixels(1)[0]).save(root / f"a.{suffix}", exif=exif)
        source = open_images(root)
        assert source.image_size == (6, 8)
        assert everything(source).shape == (1, 3, 6, 8)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    image = np.zeros((128, 128, 3), np.uint8)
    folder = put(tmp_path / "many", [image] * 4)
    data = (folder / "000.png").read_bytes()
    for i in range(4, 800):
        (folder / f"{i:03d}.png").write_bytes(data)
    tracemalloc.start()
    source = open_originals(folder, threads=2)
    count = sum(len(block) for block in source.blocks(range(len(source)), 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 800  # 39 MB
    # 1 + 2 * 2 threads * 16 / 16 blocks ahead, one in use, of 0.8 MB each, and 800 heads
    assert peak < 8 << 20


# What is refused, in one line


def grey_files(folder):
    Image.fromarray(pixels(1)[0]).convert("L").save(folder / "g.png")
    Image.fromarray(pixels(1)[0]).convert("1").save(folder / "h.png")


def sixteen_bits(folder):
    Image.fromarray(np.full((8, 6), 40_000, np.uint16)).save(folder / "g.png")


def sixteen_bits_of_colour(folder):
    """A PNG of 2 x 1 pixels by hand: Pillow reads such files and cannot write them."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 6, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x12\x34" * 18) * 8)
    (folder / "g.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def other_mode(mode, name="g.png"):
    return lambda folder: Image.fromarray(pixels(1)[0]).convert(mode).save(folder / name)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def only_text(folder):
    empty(folder)
    (folder / "a.txt").write_text("x")


def wide(folder):
    put(folder, pixels(1, 8, 16), ["wide.png"])


def transparent_colour(folder):
    Image.fromarray(pixels(1)[0]).save(folder / "g.png", transparency=(1, 2, 3))


def animated(folder):
    first, second = (Image.fromarray(image) for image in pixels(2))
    first.save(folder / "g.webp", save_all=True, append_images=[second], lossless=True)


def cut(folder):
    (folder / "g.png").write_bytes(b"")


def no_image(folder):
    (folder / "g.jpg").write_text("not a picture")


NOT_PLAIN = r"of 1[12] images are not plain 8-bit RGB: {}; converting them changes the number: .* with --convert$"
REFUSED = [
    (empty, r"real: no image in this folder; give a folder that holds some"),
    (only_text, r"real: no image in this folder \(1 other files\)"),
    (wide, r"images of 2 sizes, such as '000.png' 8 x 6 and 'wide.png' 8 x 16 \(rows x columns\); give --image-size"),
    (grey_files, NOT_PLAIN.format(r"2 grey \('g.png'\)")),
    (other_mode("CMYK", "g.jpg"), NOT_PLAIN.format(r"1 CMYK \('g.jpg'\)")),
    (other_mode("P"), NOT_PLAIN.format(r"1 with a palette \('g.png'\)")),
    (other_mode("P", "g.gif"), NOT_PLAIN.format(r"1 with a palette \('g.gif'\)")),
    (other_mode("RGBA"), NOT_PLAIN.format(r"1 with transparency \('g.png'\)")),
    (other_mode("LA"), NOT_PLAIN.format(r"1 grey \('g.png'\)")),
    (transparent_colour, NOT_PLAIN.format(r"1 with transparency \('g.png'\)")),
    (sixteen_bits, NOT_PLAIN.format(r"1 with more than 8 bits \('g.png'\)")),
    (sixteen_bits_of_colour, NOT_PLAIN.format(r"1 with more than 8 bits \('g.png'\)")),
    (animated, NOT_PLAIN.format(r"1 animated \('g.webp'\)")),
    (cut, r"1 of 11 files cannot be read, such as 'g.png': empty file \(0 bytes\); restore or remove"),
    (no_image, r"1 of 11 files cannot be read, such as 'g.jpg': not a JPEG, "),
]


@pytest.mark.parametrize(("spoil", "line"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_a_folder_that_cannot_be_measured_as_it_is_says_so_in_one_line(folder, spoil, line):
    spoil(folder)
    with pytest.raises(DataError, match=line) as caught:
        open_images(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("spoil", [row[0] for row in REFUSED[3:13]], ids=[str(i) for i in range(3, 13)])
def test_odd_images_are_converted_where_that_is_allowed_and_counted(folder, spoil):
    spoil(folder)
    source = open_images(folder, convert=True)
    assert everything(source).shape == (source.count, 3, 8, 6)
    assert any("were converted to 8-bit RGB, what is transparent on white" in note for note in source.notes)


def test_files_that_change_or_turn_out_damaged_stop_the_measurement(folder):
    source = open_images(folder)
    os.truncate(folder / "004.png", 60)
    with pytest.raises(DataError, match=r"'004.png': changed while it was measured; restore or remove it"):
        everything(source)
    with pytest.raises(DataError, match=r"'004.png': cut off: the end of the PNG is missing; restore or remove"):
        open_images(folder)  # known from the file's end, before any image is measured
    whole = bytearray((folder / "003.png").read_bytes())
    whole[50] ^= 255
    (folder / "003.png").write_bytes(whole)
    (folder / "004.png").unlink()
    with pytest.raises(DataError, match=r"'003.png': damaged: .*; restore or remove it"):
        everything(open_images(folder))


def test_a_file_that_turns_out_to_lie_on_its_side_stops_the_measurement(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    plain = (folder / "003.png").read_bytes()
    at_the_end = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))  # its head does not say so
    (folder / "003.png").write_bytes(plain[:-12] + at_the_end + plain[-12:])
    source = open_images(folder)
    with pytest.raises(DataError, match=r"'003\.png': 6 x 8 pixels, where its head says \(8, 6\); restore or remove"):
        everything(source)


@pytest.mark.parametrize(
    ("spec", "error", "line"),
    [
        ("emoji23", DataError, r"neither an image set .* nor an existing folder or .npz; did you mean 'emoji32'"),
        ("nowhere/x.npz", DataError, r"'nowhere/x.npz' is neither"),
        ("emoji32#valid", ConfigError, r"there is no part 'valid'.*#train or #validation"),
        ("emoji32#train(seed)", ConfigError, r"'seed' is no setting of a split"),
        ("emoji32#train,seed=x", ConfigError, r"'seed=x' is no setting of a split; write seed=NUMBER"),
        ("emoji32#train,depth=3", ConfigError, r"'depth=3' is no setting of a split"),
        ("emoji32#validation,fraction=0", DataError, r"holds no image: a fraction of 0.0 sets none aside"),
        ("emoji32#validation,fraction=2", ConfigError, r"outside \[0, 1\)"),
    ],
)
def test_names_that_mean_nothing_are_refused(spec, error, line):
    with pytest.raises(error, match=line):
        open_images(spec)


def test_files_that_are_no_npz_and_sizes_and_places_that_make_no_sense_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"000.png is a file; images are read from a folder, an image set, or an .npz"):
        open_images(folder / "000.png")
    np.savez(tmp_path / "x.npz", images=pixels())
    with pytest.raises(DataError, match=r"no array 'arr_0'; its keys are: images"):
        open_images(tmp_path / "x.npz")
    assert open_images(f"{tmp_path / 'x.npz'}#images").count == 10
    with pytest.raises(ConfigError, match="not positive"):
        open_images(folder, image_size=0)
    source = open_images(folder)
    with pytest.raises(ConfigError, match="at least 1"):
        source.batches(0)
    for wrong in ([10], [-1]):
        with pytest.raises(ConfigError, match=rf"has images 0 to 9, {wrong[0]} was asked for"):
            source.batches(indices=wrong)
