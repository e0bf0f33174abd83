"""The shipped set, the larger one, and the scripts that build them."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smalti.cli.data import DataBuild, DataCheck
from smalti.data import load_image_set, split
from smalti.data.image_set import merge_twins
from smalti.data.packed import PackedItems, load_packed, pack_images, pack_items
from smalti.errors import DataError
from smalti.workflows import data as building
from smalti.workflows.data_check import check

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "smalti" / "data" / "emoji32"


@pytest.fixture(scope="module")
def emoji32():
    return load_image_set("emoji32")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("build_emoji32", ROOT / "tools" / "build_emoji32.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# emoji32


def test_emoji32_has_1906_images_in_9_classes(emoji32):
    assert len(emoji32) == 1906
    assert emoji32.image_size == (32, 32)
    assert emoji32.class_names == building.CATEGORIES
    # Counts of emoji.json, version 16.0.0, by category, where has_img_google is set.
    assert np.bincount(emoji32.class_labels).tolist() == [169, 386, 159, 131, 218, 85, 264, 224, 270]


def test_emoji32_shows_what_its_names_say(emoji32):
    def mean_colour(name):
        return emoji32.read(emoji32.item_names.index(name)).reshape(-1, 3).mean(0)

    red, green, blue = mean_colour("grinning face")
    assert red > blue + 50
    assert green > blue + 50
    # A tricolour: green, white, red from left to right.
    italy = emoji32.read(emoji32.item_names.index("italy flag"))
    left, middle, right = (italy[16, c].astype(int) for c in (7, 16, 25))
    assert left.argmax() == 1
    assert middle.min() > 200
    assert right.argmax() == 0
    assert (emoji32.read(0)[0, 0] == 255).all()


def test_emoji32_is_small_and_loads_fast(emoji32):
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 2.6e6

    def seconds():
        begin = time.process_time()
        load_image_set("emoji32")
        return time.process_time() - begin

    # 0.14 s where this was written, most of it xz; three times that on a slower machine.
    assert min(seconds() for _ in range(5)) < 0.45


def test_emoji32_names_its_sources_and_licences():
    notice = (SHIPPED / "NOTICE").read_text()
    for needed in ("Noto Emoji", "Apache License, Version 2.0", "Cal Henderson", "Changes made"):
        assert needed in notice
    card = (SHIPPED / "CARD.md").read_text()
    for label, (name, count) in enumerate(
        zip(building.CATEGORIES, [169, 386, 159, 131, 218, 85, 264, 224, 270], strict=True)
    ):
        assert f"| {label} | {name} | {count} |" in card


def test_emoji32_validation_holds_one_eighth_of_the_names_and_no_training_image(emoji32):
    parts = split(emoji32, 1 / 8, seed=0)
    names = len(set(emoji32.split_names))
    assert names == 1891
    assert len({emoji32.split_names[i] for i in parts.validation}) == round(names / 8)
    train, validation = ({emoji32.read(int(i)).tobytes() for i in part} for part in (parts.train, parts.validation))
    assert not train & validation
    assert set(emoji32.class_labels[parts.validation].tolist()) == set(range(9))


def test_emoji32_can_be_rescaled(emoji32):
    small = load_image_set("emoji32", (8, 16))
    assert small.read(0).shape == (8, 16, 3)
    assert small.fingerprint != emoji32.fingerprint


def test_rebuilding_emoji32_reproduces_the_shipped_files_byte_for_byte(tool, tmp_path):
    """Set SMALTI_EMOJI_TARBALL to the tarball, or to `npm` to download it (74 MB), as CI does once."""
    source = os.environ.get("SMALTI_EMOJI_TARBALL", "")
    if not source:
        pytest.skip("set SMALTI_EMOJI_TARBALL to emoji-datasource-google-16.0.0.tgz, or to npm to download 74 MB")
    if source == "npm" and shutil.which("npm") is None:
        pytest.skip("npm is not installed; set SMALTI_EMOJI_TARBALL to emoji-datasource-google-16.0.0.tgz")
    assert tool.main(["--check", *([] if source == "npm" else ["--tarball", source])]) == 0


# Packed sets


@pytest.fixture
def packed(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (6, 4, 5, 3), dtype=np.uint8)
    items = PackedItems("tiny", ("a", "b"), [f"é {i}" for i in range(6)], [f"{i // 2}" for i in range(6)], [0, 1] * 3)
    (tmp_path / "images.npy.xz").write_bytes(pack_images(images))
    (tmp_path / "items.json").write_bytes(pack_items(items, images))
    return tmp_path, images


@pytest.mark.parametrize("compressed", [True, False])
def test_packed_set_comes_back(packed, compressed):
    folder, images = packed
    if not compressed:
        np.save(folder / "images.npy", images)
        (folder / "images.npy.xz").unlink()
    found = load_image_set(folder)
    assert np.array_equal(np.stack([found.read(i) for i in range(6)]), images)
    assert (found.name, found.class_names, found.image_size) == ("tiny", ("a", "b"), (4, 5))
    assert found.item_names[3] == "é 3"
    assert found.split_names == ("0", "0", "1", "1", "2", "2")


def test_packing_is_a_pure_function_of_the_images(packed):
    folder, images = packed
    assert pack_images(np.asfortranarray(images)) == (folder / "images.npy.xz").read_bytes()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "other", "pickle", "table", "version", "order", "fewer"])
def test_damaged_packed_set_is_refused(packed, damage):
    folder, images = packed
    stored = folder / "images.npy.xz"
    content = stored.read_bytes()
    match damage:
        case "flip":
            stored.write_bytes(content[:150] + bytes([content[150] ^ 1]) + content[151:])
        case "cut":
            stored.write_bytes(content[:-9])
        case "missing":
            stored.unlink()
        case "other":
            stored.write_bytes(pack_images(images[::-1]))
        case "pickle":
            stored.unlink()
            np.save(folder / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
        case "table":
            (folder / "items.json").write_text("{")
        case "version":
            table = json.loads((folder / "items.json").read_text())
            (folder / "items.json").write_text(json.dumps(table | {"format_version": 2}))
        case "order":
            table = json.loads((folder / "items.json").read_text())
            (folder / "items.json").write_text(json.dumps(table | {"columns": table["columns"][::-1]}))
        case "fewer":
            table = json.loads((folder / "items.json").read_text())
            (folder / "items.json").write_text(json.dumps(table | {"items": table["items"][1:]}))
    with pytest.raises(DataError, match="build or install") as caught:
        load_packed(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [np.zeros((6, 4, 5, 3), np.int16), np.zeros((6, 4, 5, 4), np.uint8)])
def test_a_packed_set_of_other_numbers_than_pixels_is_refused_though_its_checksum_fits(packed, images):
    folder, _ = packed
    (folder / "images.npy.xz").unlink()
    np.save(folder / "images.npy", images)
    table = json.loads((folder / "items.json").read_text())
    digest = hashlib.sha256(images.data).hexdigest()
    (folder / "items.json").write_text(json.dumps(table | {"images_sha256": digest}))
    with pytest.raises(DataError, match=r"expected uint8 images \(6, H, W, 3\)"):
        load_packed(folder)


def test_twins_share_a_split_name_across_chains():
    assert merge_twins(["a", "b", "b", "c", "d"], [1, 1, 2, 2, 3]) == ["a", "a", "a", "a", "d"]
    assert merge_twins(["a", "b"], [1, 2]) == ["a", "b"]


# Building, from small tarballs made here


def png_of(colour):
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def entry(name, unified, category, order, skin_tones=()):
    one = {"has_img_google": True, "has_img_twitter": True}
    skins = {t: one | {"unified": f"{unified}-{t}", "image": f"{unified}-{t}.png".lower()} for t in skin_tones}
    return one | {
        "name": name,
        "unified": unified,
        "image": f"{unified}.png".lower(),
        "category": category,
        "sort_order": order,
        "skin_variations": skins,
    }


TABLE = [
    entry("Norway Flag", "1F1F3-1F1F4", "Flags", 9),
    entry("Svalbard Flag", "1F1F8-1F1EF", "Flags", 10),
    entry("Italy Flag", "1F1EE-1F1F9", "Flags", 11),
    entry("RUNNER", "1F3C3", "People & Body", 2, ["1F3FB", "1F3FF"]),
    entry("MAN RUNNING", "1F3C3-200D-2642-FE0F", "People & Body", 3, ["1F3FB"]),
    entry("LIGHT SKIN", "1F3FB", "Component", 1),
    entry("NO PICTURE", "1F999", "Objects", 5) | {"has_img_google": False, "has_img_twitter": False},
]
COLOURS = {"1f1f3-1f1f4": "navy", "1f1f8-1f1ef": "navy"}


def make_tarball(folder, style, change=None):
    """A package of the made-up table, with one file as npm would not make it if `change` says so."""
    path = folder / f"emoji-datasource-{style}-16.0.0.tgz"
    names = [e["image"] for e in TABLE] + [v["image"] for e in TABLE for v in e["skin_variations"].values()]
    with tarfile.open(path, "w:gz") as archive:

        def add(name, content, **fields):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))

        add("package/emoji.json", json.dumps(TABLE).encode())
        add("../../escape.txt", b"never written")
        add("package/img/sheets/sheet.png", b"never read")
        for i, name in enumerate(sorted(names)):
            colour = COLOURS.get(name[:-4], (i * 20, 50, 80 if style == "google" else 160))
            if change == "missing" and name == "1f3c3.png":
                continue
            if change == "broken" and name == "1f3c3.png":
                add(f"package/img/{style}/64/{name}", b"\x89PNG broken")
            elif change == "link" and name == "1f3c3.png":
                add(f"package/img/{style}/64/{name}", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            elif change == "large" and name == "1f3c3.png":
                add(f"package/img/{style}/64/{name}", bytes(1 << 19))
            else:
                add(f"package/img/{style}/64/{name}", png_of(colour))
    return path


def package_of(path, style):
    return building.EmojiPackage(style, "16.0.0", building._integrity(path.read_bytes()))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    paths = {style: make_tarball(tmp_path, style) for style in ("google", "twitter")}
    monkeypatch.setattr(building, "GOOGLE", package_of(paths["google"], "google"))
    monkeypatch.setattr(building, "TWITTER", package_of(paths["twitter"], "twitter"))
    return paths


def test_emoji32_takes_base_emoji_of_the_nine_categories_in_order(packages):
    items, images = building.emoji32(packages["google"], building.GOOGLE)
    assert items.item_names == ["runner", "man running", "norway flag", "svalbard flag", "italy flag"]
    assert items.split_names == ["runner", "man running", "norway flag", "norway flag", "italy flag"]
    assert items.class_labels == [1, 1, 8, 8, 8]
    assert images.shape == (5, 32, 32, 3)
    assert images[2, 0, 0].tolist() == [0, 0, 128]


def test_emoji64_keeps_skin_tones_styles_and_variants_on_one_side(packages):
    items, images = building.emoji64(packages["google"], packages["twitter"])
    assert images.shape == (16, 64, 64, 3)
    assert items.item_names[:3] == ["noto/runner", "noto/runner, light skin", "noto/runner, dark skin"]
    assert items.item_names[8] == "twemoji/runner"
    assert set(items.split_names[:5] + items.split_names[8:13]) == {"1F3C3"}
    assert items.split_names[5] == items.split_names[6] != items.split_names[7]


@pytest.mark.parametrize(
    ("code_points", "base"),
    [
        ("1F3C3", "1F3C3"),
        ("1F3C3-200D-2642-FE0F", "1F3C3"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
        ("1F468-200D-1F33E", "1F468-200D-1F33E"),
        ("2642-FE0F", "2642"),
        ("27A1-FE0F", "27A1"),
        ("1F1EE-1F1F9", "1F1EE-1F1F9"),
    ],
)
def test_base_code_points_drop_gender_and_direction(code_points, base):
    assert building.base_code_points(code_points) == base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "listed in emoji.json but missing"),
        ("broken", r"'runner' \(1F3C3\): not a JPEG"),
        ("link", "is not a file of at most"),
        ("large", "is not a file of at most"),
    ],
)
def test_bad_member_is_refused_and_nothing_is_extracted(tmp_path, change, message):
    path = make_tarball(tmp_path, "google", change)
    with pytest.raises(DataError, match=message):
        building.emoji32(path, package_of(path, "google"))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert not (tmp_path.parent / "escape.txt").exists()


def test_tarball_that_is_not_the_pinned_version_is_refused(tmp_path):
    path = make_tarball(tmp_path, "google")
    with pytest.raises(DataError, match=r"is not emoji-datasource-google 16\.0\.0"):
        building.emoji32(path)
    with pytest.raises(DataError, match="cannot be read"):
        building.emoji32(tmp_path / "none.tgz")


def test_tool_builds_and_then_finds_no_difference(tool, packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "GOOGLE", building.GOOGLE)
    monkeypatch.setattr(tool, "emoji32", lambda path: building.emoji32(path, building.GOOGLE))
    out, tarball = tmp_path / "out", str(packages["google"])
    assert tool.main(["--tarball", tarball, "--out", str(out)]) == 0
    assert tool.main(["--tarball", tarball, "--out", str(out), "--check"]) == 0
    assert "byte for byte" in capsys.readouterr().out
    (out / "images.npy.xz").write_bytes(pack_images(np.zeros((5, 32, 32, 3), np.uint8)))
    items, _ = building.emoji32(packages["google"], building.GOOGLE)
    (out / "items.json").write_bytes(pack_items(items, np.zeros((5, 32, 32, 3), np.uint8)))
    assert tool.main(["--tarball", tarball, "--out", str(out), "--check"]) == 1
    assert "pixels are different" in capsys.readouterr().out
    shutil.rmtree(out)
    assert tool.main(["--tarball", tarball, "--out", str(out), "--check"]) == 1
    assert tool.main(["--tarball", str(tmp_path / "none.tgz"), "--out", str(out)]) == DataError.exit_code


def test_data_build_puts_emoji64_where_it_is_looked_for(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="run `smalti data build emoji64`"):
        load_image_set("emoji64")
    both = (packages["twitter"], packages["google"])
    DataBuild(name="emoji64", tarball=both).run()
    first = load_image_set("emoji64")
    assert (len(first), first.image_size) == (16, (64, 64))
    DataBuild(name="emoji64", tarball=both).run()
    assert load_image_set("emoji64").fingerprint == first.fingerprint
    folder = tmp_path / "cache" / "smalti"
    assert [p.name for p in folder.iterdir()] == ["emoji64"], "no leftovers"
    assert "More than half (62.5%) are People & Body" in (folder / "emoji64" / "CARD.md").read_text()
    assert "CC-BY 4.0" in (folder / "emoji64" / "NOTICE").read_text()
    capsys.readouterr()
    DataCheck(path="emoji64").run()
    assert capsys.readouterr().out.startswith("emoji64: 16 images, 64 x 64")


def test_data_build_refuses_wrong_tarballs_and_foreign_folders(packages, tmp_path):
    with pytest.raises(DataError, match="no tarball of emoji-datasource-twitter"):
        DataBuild(name="emoji64", tarball=(packages["google"],)).run()
    (tmp_path / "other.tgz").write_bytes(b"x")
    with pytest.raises(DataError, match="is neither emoji-datasource-google nor"):
        DataBuild(name="emoji64", tarball=(tmp_path / "other.tgz",)).run()
    with pytest.raises(DataError, match="is not an image set that smalti built"):
        DataBuild(name="emoji64", tarball=tuple(packages.values()), out=tmp_path).run()


def test_download_runs_npm_pack_without_scripts(tmp_path, monkeypatch):
    calls = []

    def npm(command, cwd, **options):
        calls.append(command)
        (Path(cwd) / "emoji-datasource-google-16.0.0.tgz").write_bytes(b"content")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(building.subprocess, "run", npm)
    assert building.fetch(building.GOOGLE, tmp_path).read_bytes() == b"content"
    assert calls == [["npm", "pack", "--silent", "--ignore-scripts", "emoji-datasource-google@16.0.0"]]


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"`npm` was not found; install Node\.js, or download the tarball"):
        building.fetch(building.GOOGLE, tmp_path)
    failing = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error network")
    monkeypatch.setattr(building.subprocess, "run", lambda *a, **k: failing)
    with pytest.raises(DataError, match="ENOTFOUND npm error network"):
        building.fetch(building.GOOGLE, tmp_path)


# smalti data check


def test_data_check_prints_what_it_found(tmp_path, capsys):
    for i in range(3):
        (tmp_path / "cats").mkdir(exist_ok=True)
        Image.new("RGB", (8, 4 + i // 2)).save(tmp_path / "cats" / f"{i}.png")
    (tmp_path / "dogs").mkdir()
    (tmp_path / "cats" / "x\n.jpg").write_bytes(b"text")
    (tmp_path / "notes.txt").write_text("text")
    DataCheck(path=str(tmp_path)).run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: 3 images, 1 unusable files"
    assert "sizes: 2, 4 x 8 to 5 x 8 (rows x columns)" in lines
    assert "formats: PNG RGB 3" in lines
    assert "exact copies: 1 (a split keeps them together)" in lines
    assert "  1 'dogs': 0 images  <- empty" in lines
    assert "unusable 'cats/x\\n.jpg': not a JPEG, PNG, WEBP, BMP, GIF or TIFF image" in lines
    assert any(line.startswith("left out 'notes.txt'") for line in lines)


def test_data_check_names_a_limited_number_of_files(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(b"")
    assert "and 10 more" in check(str(tmp_path)).text
    assert "more" not in check(str(tmp_path), listed=None).text


def test_shipped_table_matches_its_images():
    table = json.loads((SHIPPED / "items.json").read_text())
    images = load_packed(SHIPPED).images
    assert hashlib.sha256(np.ascontiguousarray(images).data).hexdigest() == table["images_sha256"]
