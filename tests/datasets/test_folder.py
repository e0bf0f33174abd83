"""Folders of images: classes, the checked index, odd trees, and files that change under a run."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from smalti.data import SampleOrder, load_batch, load_image_set, split
from smalti.data import folder_pass as passes
from smalti.data.folder import ChangedFileError, index_folder, load_folder
from smalti.errors import ConfigError, DataError


def put(path, colour=(9, 9, 9), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def animals(tmp_path):
    root = tmp_path / "animals"
    for i in range(6):
        put(root / "cats" / f"{i}.png", (i, 0, 0))
        put(root / "dogs" / "old" / f"{i}.png", (0, i, 0))
    return root


def test_sub_folders_are_classes_in_order_of_name(animals):
    images = load_image_set(animals)
    assert (images.name, images.class_names, images.image_size) == ("animals", ("cats", "dogs"), (8, 8))
    assert images.class_labels.tolist() == [0] * 6 + [1] * 6
    assert images.class_labels.dtype == np.int64
    assert images.item_names[:1] + images.item_names[-1:] == ("cats/0.png", "dogs/old/5.png")
    assert images.read(3).tolist() == np.full((8, 8, 3), (3, 0, 0)).tolist()


def test_images_directly_in_the_folder_have_no_classes(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "b.png", (1, 1, 1))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "list.txt").write_text("a, b")
    images = load_image_set(str(tmp_path))
    assert (images.class_names, len(images.class_labels), len(images)) == ((), 0, 2)
    batch = load_batch(images, SampleOrder([0, 1], seed=0), [0, 1], flip=False, seed=0)
    assert batch.class_labels is None


def test_other_files_are_left_out_but_listed(animals):
    (animals / "README.txt").write_text("two kinds of animal")
    (animals / "cats" / "labels.csv").write_text("0,1")
    (animals / ".DS_Store").write_text("x")
    index = index_folder(animals)
    assert [(r.path, r.other) for r in index.rejected] == [("README.txt", True), ("cats/labels.csv", True)]
    assert len(load_image_set(animals)) == 12


def test_image_without_suffix_is_found_by_its_content(animals):
    put(animals / "cats" / "extra.png", (77, 0, 0))
    (animals / "cats" / "extra.png").rename(animals / "cats" / "extra")
    assert "cats/extra" in load_image_set(animals).item_names


def test_images_of_several_sizes_need_a_size(animals):
    put(animals / "cats" / "wide.png", size=(16, 8))
    with pytest.raises(DataError, match=r"2 different sizes.*set image_size"):
        load_image_set(animals)
    images = load_image_set(animals, (4, 6))
    assert images.read(0).shape == (4, 6, 3)
    with pytest.raises(ConfigError, match="not positive"):
        load_image_set(animals, 0)


# Errors


@pytest.mark.faults
def test_missing_folder_and_file_in_place_of_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"neither an image set .* nor an existing folder"):
        load_image_set(tmp_path / "nothing")
    with pytest.raises(DataError, match="did you mean 'emoji32'"):
        load_image_set("emoji23")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; give the folder"):
        load_image_set(tmp_path / "file")


@pytest.mark.faults
def test_folder_without_images(tmp_path):
    with pytest.raises(DataError, match=r"no image in this folder; give"):
        load_image_set(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty class").mkdir()
    with pytest.raises(DataError, match=r"no image in this folder \(1 other files\)"):
        load_image_set(tmp_path)


@pytest.mark.faults
def test_unreadable_files_are_listed_and_can_be_left_out(animals, caplog):
    whole = (animals / "cats" / "0.png").read_bytes()
    for i in range(7):
        (animals / "cats" / f"cut{i}.png").write_bytes(whole[:45])
    with pytest.raises(DataError, match="7 of 19 files cannot be used") as caught:
        load_image_set(animals)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 5 + 1
    assert lines[1].startswith("  'cats/cut0.png': damaged")
    assert "and 2 more" in lines[-1]
    assert not caplog.messages
    kept = load_image_set(animals, skip_unreadable=True)
    assert len(kept) == 12
    (told,) = caplog.messages
    assert told.startswith(f"{animals}: 7 of 19 files cannot be used and are left out ('cats/cut0.png': damaged")
    shutil.rmtree(animals / "dogs")
    only_cats = load_image_set(animals, skip_unreadable=True)
    assert only_cats.class_names == ("cats",)


@pytest.mark.faults
def test_one_broken_image_among_good_ones_is_named_with_its_reason(animals):
    (animals / "dogs" / "x.jpg").write_text("not really a picture")
    with pytest.raises(DataError, match=r"1 of 13 files cannot be used \('dogs/x.jpg': not a JPEG.*\); ") as caught:
        load_image_set(animals)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_class_without_image_is_an_error_unless_allowed(animals):
    (animals / "ants").mkdir()
    with pytest.raises(DataError, match="no image in class folder 'ants'"):
        load_image_set(animals)
    allowed = load_image_set(animals, allow_empty=True)
    assert allowed.class_names == ("ants", "cats", "dogs")
    assert set(allowed.class_labels.tolist()) == {1, 2}


@pytest.mark.faults
def test_class_whose_images_are_all_broken_counts_as_empty(animals):
    (animals / "bad").mkdir()
    (animals / "bad" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="no image in class folder 'bad'"):
        load_image_set(animals, skip_unreadable=True)


@pytest.mark.faults
@pytest.mark.parametrize("twin", ["Cats", "CATS"])
def test_class_names_that_differ_by_case_are_refused(animals, twin):
    put(animals / twin / "x.png")
    with pytest.raises(DataError, match="differ only by case"):
        load_image_set(animals)


@pytest.mark.faults
def test_images_beside_class_folders_are_refused(animals):
    put(animals / "stray.png")
    with pytest.raises(DataError, match=r"1 images lie beside the class folders, such as 'stray.png'"):
        load_image_set(animals)


@pytest.mark.faults
def test_class_only_in_validation_is_refused_unless_allowed(animals):
    put(animals / "ants" / "x.png", (200, 0, 0))
    images = load_image_set(animals)
    ant = images.item_names.index("ants/x.png")
    unlucky = next(seed for seed in range(99) if ant in split(images, 0.2, seed, allow_empty=True).validation)
    with pytest.raises(DataError, match=r"1 classes have no image left to train on \('ants'\)"):
        split(images, 0.2, unlucky)


# Odd trees


@pytest.mark.faults
def test_links_outside_are_refused_and_loops_end(animals, tmp_path):
    put(tmp_path / "outside" / "secret.png")
    os.symlink(animals, animals / "cats" / "loop")
    os.symlink("self", animals / "cats" / "self")
    os.symlink(animals / "dogs", animals / "alias")
    os.symlink(animals / "cats" / "0.png", animals / "dogs" / "linked.png")
    index = index_folder(animals)
    assert index.class_names == ("cats", "dogs")
    assert len(index.entries) == 13, "the linked file inside counts, folders count once"
    assert {r.path: r.other for r in index.rejected} == {"alias": True, "cats/loop": True, "cats/self": False}
    (animals / "cats" / "self").unlink()
    os.symlink(tmp_path / "outside", animals / "cats" / "out")
    os.symlink(tmp_path / "outside" / "secret.png", animals / "cats" / "out.png")
    os.symlink("nowhere.png", animals / "cats" / "dangling.png")
    reasons = {r.path: r.reason for r in index_folder(animals).unusable}
    assert sorted(reasons) == ["cats/dangling.png", "cats/out", "cats/out.png"]
    assert "outside" in reasons["cats/out"]
    assert "outside" in reasons["cats/out.png"]
    with pytest.raises(DataError, match="3 of 16 files"):
        load_image_set(animals)


@pytest.mark.faults
def test_a_neighbour_whose_name_begins_alike_is_outside(animals):
    put(animals.with_name("animals of others") / "secret.png")
    os.symlink(animals.with_name("animals of others") / "secret.png", animals / "cats" / "out.png")
    with pytest.raises(DataError, match=r"1 of 13 files cannot be used \('cats/out.png': link that leads outside"):
        load_image_set(animals)


@pytest.mark.faults
def test_where_nothing_else_is_there_broken_images_cannot_be_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 1 files cannot be used \('a.png': empty file"):
        load_image_set(tmp_path, skip_unreadable=True)


def test_latents_in_the_place_of_images_are_told(tmp_path):
    (tmp_path / "latents.json").write_text("{}")
    with pytest.raises(DataError, match="holds latents, made by `smalti encode` already; give a folder of images"):
        load_image_set(tmp_path)


def test_a_linked_root_is_fine(animals, tmp_path):
    os.symlink(animals, tmp_path / "link")
    assert load_image_set(tmp_path / "link").fingerprint == load_image_set(animals).fingerprint


@pytest.mark.faults
def test_a_folder_that_is_mounted_below_twice_is_read_once(animals, monkeypatch):
    real = os.stat

    def stat(path, **options):
        return real(animals / "cats" if str(path).endswith("old") else path, **options)

    # a mount of one folder in another would need root
    monkeypatch.setattr(os, "stat", stat)
    assert len(index_folder(animals).entries) == 6


@pytest.mark.faults
def test_a_file_that_vanishes_before_it_is_looked_at_is_named(animals, monkeypatch):
    walk = passes.walk_files
    monkeypatch.setattr(passes, "walk_files", lambda root, rejected: [*walk(root, rejected), "cats/gone"])
    with pytest.raises(DataError, match=r"1 of 13 files cannot be used \('cats/gone': cannot be read: No such file"):
        load_image_set(animals)


@pytest.mark.faults
def test_a_file_larger_than_any_image_is_refused_and_not_read(animals):
    (animals / "cats" / "huge.png").touch()
    os.truncate(animals / "cats" / "huge.png", (1 << 29) + 1)  # of holes
    with pytest.raises(DataError, match=r"'cats/huge.png': 536870913 bytes; more than 512 MiB is refused"):
        load_image_set(animals)


@pytest.mark.faults
def test_pipes_do_not_block(animals):
    os.mkfifo(animals / "cats" / "pipe.png")
    assert [r.path for r in index_folder(animals).unusable] == ["cats/pipe.png"]


@pytest.mark.faults
def test_unreadable_folder_is_reported(animals, monkeypatch):
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("old"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    # chmod would not stop a test that runs as root
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"'dogs/old': folder cannot be read: Permission denied"):
        load_image_set(animals)


@pytest.mark.faults
def test_odd_names_survive(tmp_path):
    names = [b"new\nline.png", b"caf\xe9.png", "größe.png".encode(), b" .png", b"quote'\".png"]
    put(tmp_path / "a.png")
    for i, name in enumerate(names):
        put(tmp_path / "x.png", (i, i, i))
        os.rename(tmp_path / "x.png", os.path.join(os.fsencode(tmp_path), name))
    images = load_image_set(tmp_path)
    assert len(images) == 6
    assert {os.fsencode(n) for n in images.item_names} == {b"a.png", *names}
    assert len(images.fingerprint) == 64
    split(images, 0.5, 0)
    with open(os.path.join(os.fsencode(tmp_path), b"bad\n\xe9.png"), "wb"):
        pass
    with pytest.raises(DataError) as caught:
        load_image_set(tmp_path)
    str(caught.value).encode("utf-8")
    assert len(str(caught.value).splitlines()) == 1


# Fingerprint


def test_fingerprint_is_of_contents_not_of_place_or_time(animals, tmp_path):
    first = load_image_set(animals).fingerprint
    shutil.copytree(animals, tmp_path / "elsewhere" / "animals", copy_function=shutil.copy)
    assert load_image_set(tmp_path / "elsewhere" / "animals").fingerprint == first
    assert load_image_set(animals, 4).fingerprint != first


@pytest.mark.faults
@pytest.mark.parametrize("change", ["add", "remove", "overwrite", "rename", "relabel"])
def test_fingerprint_sees_every_change(animals, change):
    first = load_image_set(animals).fingerprint
    cat = animals / "cats" / "3.png"
    match change:
        case "add":
            put(animals / "cats" / "new.png")
        case "remove":
            cat.unlink()
        case "overwrite":
            before = os.stat(cat)
            put(cat, (4, 0, 0))
            os.utime(cat, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "rename":
            cat.rename(cat.with_name("33.png"))
        case "relabel":
            cat.rename(animals / "dogs" / "3.png")
    assert load_image_set(animals).fingerprint != first


# Changes under a run


@pytest.fixture
def uncached(tmp_path):
    root = tmp_path / "many"
    for i in range(40):
        put(root / f"{i:02}.png", (i, i, i))
    return load_folder(root, None, cache_bytes=1000)


def test_small_sets_are_held_in_memory(animals):
    images = load_image_set(animals)
    shutil.rmtree(animals)
    assert images.read(5)[0, 0].tolist() == [5, 0, 0]


def test_large_sets_are_read_from_their_files(uncached):
    assert uncached.cache is None
    assert uncached.read(7)[0, 0].tolist() == [7, 7, 7]


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["remove", "overwrite", "truncate", "touch", "grow", "pipe"])
def test_changed_file_is_replaced_by_the_same_training_image_every_time(uncached, damage):
    path = uncached.index.root / "03.png"
    match damage:
        case "remove":
            path.unlink()
        case "overwrite":
            put(path, (200, 0, 0), size=(9, 9))
        case "truncate":
            path.write_bytes(path.read_bytes()[:-8])
        case "touch":
            os.utime(path, ns=(0, 0))
        case "grow":
            # With the time of before, and no damage to the image.
            before = os.stat(path)
            path.write_bytes(path.read_bytes() + b" ")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "pipe":
            path.unlink()
            os.mkfifo(path)
    order = SampleOrder(range(20), seed=1)
    positions = [p for p in range(20) if order.at(p)[1] in (2, 3, 4)]
    batch = load_batch(uncached, order, positions, flip=False, seed=0)
    wanted = [order.at(p)[1] for p in positions]
    found = batch.indices.tolist()
    replacement = found[wanted.index(3)]
    assert [f for f, w in zip(found, wanted, strict=True) if w != 3] == [w for w in wanted if w != 3]
    assert replacement == order.replacement(3, 0)
    assert replacement in range(20), "never from outside the order, such as validation"
    shown = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert shown == found


@pytest.mark.faults
def test_a_replacement_brings_its_own_label_and_is_passed_over_if_it_fails_too(animals):
    images = load_folder(animals, None, cache_bytes=0)
    images._tally.reads = 10_000  # two bad files among many
    order = SampleOrder(range(12), seed=1)
    for gone in range(12):
        failed = {gone, order.replacement(gone, 0)}
        wanted = next(r for attempt in range(99) if (r := order.replacement(gone, attempt)) not in failed)
        if len(failed) == 2 and images.class_labels[wanted] != images.class_labels[gone]:
            break
    for index in failed:
        (animals / images.item_names[index]).unlink()
    position = next(p for p in range(12) if order.at(p)[1] == gone)
    batch = load_batch(images, order, [position], flip=False, seed=0)
    assert batch.indices.tolist() == [wanted]
    assert batch.class_labels.tolist() == [images.class_labels[wanted]]


@pytest.mark.faults
def test_too_many_changed_files_stop_the_run(uncached):
    for i in (3, 4):
        (uncached.index.root / f"{i:02}.png").unlink()
    with pytest.raises(ChangedFileError, match=r"'03.png': cannot be read"):
        uncached.read(3)
    with pytest.raises(DataError, match=r"2 of 2 reads failed, more than 0.1 %") as caught:
        uncached.read(4)
    assert not isinstance(caught.value, ChangedFileError)


@pytest.mark.faults
def test_one_failure_in_a_thousand_reads_is_tolerated(uncached):
    (uncached.index.root / "03.png").unlink()
    for i in range(2999):
        uncached.read(i % 3)
    for _ in range(3):
        with pytest.raises(ChangedFileError):
            uncached.read(3)
    with pytest.raises(DataError, match="4 of 3003 reads failed"):
        uncached.read(3)
