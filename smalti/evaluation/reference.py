"""Files of reference statistics: mean and covariance of the features of real images, so that nobody must have these.

ADM's reference batches call them `mu`, `sigma` (pool) and `mu_s`, `sigma_s` (spatial), often beside some of the images;
pytorch-fid and clean-fid write `mu` and `sigma`. Ours have the same keys, and say what they were made of.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from smalti.config import from_dict, to_dict
from smalti.data.npz import IMAGES, is_statistics
from smalti.data.npz_file import Member, NpzFile, archive_of
from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.moments import Moments
from smalti.storage.filesystem import (
    FileRecord,
    FileSystem,
    LocalFileSystem,
    make_folders,
    read_record,
    require_space,
    storage_errors,
)
from smalti.storage.replacing import replace_file

KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_FORMAT, _VERSION = "smalti-statistics", 1
_LIMIT = 1 << 30  # bytes of a covariance: 11,585 dimensions
_ASYMMETRY = 1e-6  # of the largest entry; what rounding leaves in float32
# Known by their widths only: what to say of a file that does not name its network.
_SEEMS = {2048: "inception", 2023: "inception", 1280: "lite0", 384: "dinov2", 768: "dinov2", 1024: "dinov2"}

Contents = Literal["images", "statistics", "both"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a file of reference statistics holds.

    Attributes:
        name: of the file.
        digest: SHA-256 of the file.
        moments: float64, by kind of features; those of other people's files do not know their count.
        identity: the feature network; None in other people's files.
        images: the fingerprint or name of the images; "" in other people's files.
    """

    name: str
    digest: str
    moments: Mapping[str, Moments]
    identity: NetworkIdentity | None = None
    images: str = ""

    @property
    def count(self) -> int | None:
        """Images behind the statistics; None where the file does not say."""
        return next(iter(self.moments.values())).count


def holds(path: Path) -> Contents:
    """What an `.npz` can be used as.

    Raises:
        DataError: it is damaged, or holds neither images nor statistics.
    """
    keys = NpzFile(path).keys
    if is_statistics(keys):
        return "both" if IMAGES in keys else "statistics"
    if IMAGES in keys:
        return "images"
    raise DataError(
        f"{path} holds neither images ({IMAGES}) nor statistics (mu and sigma); its keys are: "
        + (", ".join(sorted(keys)) or "none")
    )


def read_statistics(
    path: Path, identity: NetworkIdentity | None = None, widths: Mapping[str, int] | None = None
) -> Statistics:
    """Read a file of reference statistics; nothing in it is executed.

    Args:
        identity: the feature network in use, which must be that of the file where the file names one.
        widths: of its features by kind; a kind that the network does not make is left out.

    Raises:
        DataError: no statistics, damaged ones, or statistics of another feature network.
    """
    file = NpzFile(path)
    if not is_statistics(file.keys):
        have = ", ".join(sorted(file.keys)) or "none"
        raise DataError(f"{path} holds no statistics: expected mu and sigma, its keys are: {have}")
    made_with, images = _read_note(file)
    if identity is not None and made_with is not None:
        _refuse_other_network(path, made_with, identity)
    count = _read_count(file)
    moments = {}
    for kind, (mean_key, covariance_key) in KEYS.items():
        if {mean_key, covariance_key} <= set(file.keys) and (widths is None or kind in widths):
            network = identity.name if identity is not None else "the network in use"
            width = None if widths is None else widths[kind]
            moments[kind] = _read_moments(file, mean_key, covariance_key, count, (network, kind, width))
    if not moments:
        raise DataError(
            f"{path} holds statistics of spatial features only, which this feature network does not make; "
            "give statistics made with it, or images"
        )
    return Statistics(path.name, read_record(path).sha256, moments, made_with, images)


def _read_moments(
    file: NpzFile, mean_key: str, covariance_key: str, count: int | None, expected: tuple[str, str, int | None]
) -> Moments:
    mean, covariance = _read_floats(file, mean_key), _read_floats(file, covariance_key)
    network, kind, width = expected
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        raise DataError(
            f"{file.path}: {mean_key} is {tuple(mean.shape)} and {covariance_key} {tuple(covariance.shape)}; expected "
            "(D,) and (D, D)"
        )
    if width is not None and len(mean) != width:
        seems = f"; it seems made for {_SEEMS[len(mean)]}" if len(mean) in _SEEMS else ""
        raise DataError(
            f"{file.path}: {mean_key} has {len(mean)} values, and the {kind} features of {network} have "
            f"{width}{seems}; give statistics made with the same network, or images"
        )
    size = float(covariance.abs().max())
    if float((covariance - covariance.T).abs().max()) > _ASYMMETRY * size:
        raise DataError(f"{file.path}: {covariance_key} is not symmetric, so it is no covariance; make it anew")
    if float(covariance.diagonal().min()) < 0:
        raise DataError(f"{file.path}: {covariance_key} has negative variances, so it is no covariance; make it anew")
    return Moments(count, mean, (covariance + covariance.T) / 2)


def _read_floats(file: NpzFile, key: str) -> Tensor:
    header = file.header(key)
    if header.dtype.kind != "f" or header.dtype.itemsize < 4:
        raise DataError(f"{file.path}: {key} is {header}; expected float64, or at least float32")
    values = torch.from_numpy(np.ascontiguousarray(file.read(key, limit=_LIMIT), dtype=np.float64))
    if not torch.isfinite(values).all():
        raise DataError(f"{file.path}: {key} has values that are not finite; make the statistics anew")
    return values


def _read_count(file: NpzFile) -> int | None:
    if "count" not in file.keys:
        return None
    header = file.header("count")
    count = int(file.read("count", limit=8)) if header.shape == () and header.dtype.kind in "iu" else 0
    if count < 2:
        raise DataError(f"{file.path}: count is {header if count == 0 else count}; expected one whole number from 2 on")
    return count


def _read_note(file: NpzFile) -> tuple[NetworkIdentity | None, str]:
    """Network and images that one of our own files names."""
    if "smalti" not in file.keys:
        return None, ""
    header = file.header("smalti")
    if header.shape != () or header.dtype.kind != "U":
        raise DataError(f"{file.path}: the note of smalti is {header}, expected one text; make the statistics anew")
    note: Any = None
    try:
        note = json.loads(str(file.read("smalti", limit=1 << 20)))
        if not isinstance(note, dict) or note.get("format") != _FORMAT or not isinstance(note.get("images"), str):
            raise ValueError(f"its format is not {_FORMAT}")
        if note.get("version") != _VERSION:
            raise ValueError(f"it is of version {note.get('version')}, and this smalti reads {_VERSION}")
        return from_dict(NetworkIdentity, note["network"], "network"), note["images"]
    except (ValueError, KeyError, RecursionError) as error:
        raise DataError(
            f"{file.path}: the note of smalti cannot be read ({error}); make the statistics anew, or update smalti"
        ) from error


def _refuse_other_network(path: Path, made_with: NetworkIdentity, used: NetworkIdentity) -> None:
    # Not the numerics: the same network on another device gives the same features within rounding.
    for field in ("name", "weights", "resize"):
        theirs, ours = getattr(made_with, field), getattr(used, field)
        if theirs != ours:
            what = "feature network" if field == "name" else f"{field} of {made_with.name}"
            if field == "weights":
                theirs, ours = theirs[:12], ours[:12]
            raise DataError(
                f"{path} was made with the {what} {theirs!r}, and {ours!r} is in use; make the statistics anew with "
                "the network in use, or use theirs"
            )


def write_statistics(
    path: Path,
    moments: Mapping[str, Moments],
    identity: NetworkIdentity,
    images: str,
    count: int,
    *,
    fs: FileSystem | None = None,
) -> FileRecord:
    """Write mean and covariance as a reference for later; the file appears whole or not at all.

    The same statistics give the same bytes.

    Args:
        moments: of the kinds pool and spatial, at least one of them.
        images: fingerprint or name of the images.
        count: images behind the statistics.

    Raises:
        ConfigError: the file is not called `.npz`.
        DataError: no moments, of a kind that such files do not have, or of another number of images.
        StorageError: the disk is full or refuses; what stood at `path` before is untouched.
    """
    fs = LocalFileSystem() if fs is None else fs
    if path.suffix != ".npz":
        raise ConfigError(f"statistics are stored as .npz, got {path}; give a name that ends so")
    if not moments or not set(moments) <= set(KEYS) or any(found.count != count for found in moments.values()):
        told = ", ".join(f"{kind} of {found.count} images" for kind, found in moments.items()) or "none"
        raise DataError(f"expected statistics of the kinds {' or '.join(KEYS)}, of {count} images each, got {told}")
    needed = sum(found.mean.nbytes + found.covariance.nbytes for found in moments.values()) + 4096
    advice = "What stood there before is untouched; make room or choose another place"
    with storage_errors(fs, path.parent, needed, f"writing {path.name}", advice):
        make_folders(fs, path.parent)
        require_space(fs, path.parent, needed, path.name)
        return replace_file(fs, path, archive_of(_members(moments, identity, images, count)))


def _members(moments: Mapping[str, Moments], identity: NetworkIdentity, images: str, count: int) -> Iterator[Member]:
    for kind, keys in KEYS.items():
        if kind in moments:
            for key, values in zip(keys, (moments[kind].mean, moments[kind].covariance), strict=True):
                yield key, tuple(values.shape), "<f8", [values.numpy().astype("<f8")]
    yield "count", (), "<i8", [np.array(count, dtype="<i8")]
    note = {"format": _FORMAT, "version": _VERSION, "network": to_dict(identity), "images": images}
    text = json.dumps(note, sort_keys=True)
    yield "smalti", (), f"<U{len(text)}", [np.array(text, dtype=f"<U{len(text)}")]
