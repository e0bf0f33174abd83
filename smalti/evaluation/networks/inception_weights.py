"""The weights of the FID Inception network: where they lie, how they come, and whether they are the published ones.

They are those of TensorFlow's graph of 2015-12-05, converted to PyTorch once; pytorch-fid and torch-fidelity offer the
same file under two names. A file is known by its SHA-256, never by its name.
"""

import contextlib
import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smalti.checkpoints.foreign import read_foreign
from smalti.data.sets import cache_folder
from smalti.errors import CheckpointError
from smalti.storage.filesystem import read_record

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
FILE_NAMES = (FILE_NAME, "weights-inception-2015-12-05-6726825d.pth")  # pytorch-fid's, torch-fidelity's
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE_NAME}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BYTES = 95_628_359

_TIMEOUT = 30  # seconds without a byte
_STALE = 24 * 3600  # seconds after which a part of a download belongs to nobody
_PIECE = 1 << 20

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class InceptionWeights:
    """What a file of weights holds.

    Attributes:
        published: the file is, byte for byte, the one that numbers called FID are made with.
    """

    tensors: dict[str, Tensor]
    published: bool


def find_inception_weights(path: Path | None = None, *, on_progress: OnProgress | None = None) -> Path:
    """The file with the weights: the one named, or one that lies in a usual place, or else a new download.

    The usual places are smalti's folder for caches and torch hub's for checkpoints (`$TORCH_HOME/hub/checkpoints`),
    where pytorch-fid and torch-fidelity keep theirs. What lies there, and what is downloaded, must have the known hash.

    Args:
        path: takes any file that is there; `read_inception_weights` says whether it is the published one.
        on_progress: told how many bytes of how many have been downloaded.

    Raises:
        CheckpointError: there is no such file, or none anywhere and the download failed; it says what to do.
    """
    if path is not None:
        if not path.is_file():
            raise CheckpointError(f"{path} with the weights of Inception does not exist; fetch {URL}")
        return path
    folders = (cache_folder(), Path(torch.hub.get_dir()) / "checkpoints")
    damaged = []
    for candidate in (folder / name for folder in folders for name in FILE_NAMES):
        if candidate.is_file():
            if _sha256(candidate) == SHA256:
                return candidate
            damaged.append(str(candidate))
    target = folders[0] / FILE_NAME
    try:
        download(URL, target, SHA256, on_progress=on_progress)
    except CheckpointError as error:
        found = f"found only damaged files ({', '.join(damaged)})" if damaged else "found nothing"
        raise CheckpointError(
            f"the weights of the FID Inception network are not here: looked for {' and '.join(FILE_NAMES)} in "
            f"{' and '.join(map(str, folders))}, {found}; {error}. Fetch that file on another machine and put it "
            f"into {folders[0]}, or name it: --features inception:PATH"
        ) from error
    return target


def read_inception_weights(path: Path) -> InceptionWeights:
    """Tensors of a file, `.pth` or `.safetensors`, read as a stranger's.

    The published one may also be of torch's form before 1.6, a bare pickle, because its hash says what is in it.

    Raises:
        CheckpointError: it is damaged, or of a form that is not safe to read.
    """
    try:
        published = _sha256(path) == SHA256
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not published and path.name in FILE_NAMES:
        raise CheckpointError(
            f"{path} is called like the published weights of Inception, but has other bytes: it is damaged or half "
            f"of a download; fetch {URL} again, or give weights of your own another name"
        )
    return InceptionWeights(read_foreign(path, old_form=published).tensors, published)


def download(url: str, target: Path, sha256: str, *, on_progress: OnProgress | None = None) -> None:
    """Fetch a file; it gets its name when it is whole, on the disk and of this hash, and not before.

    Raises:
        CheckpointError: there is no way to the server, it has no such file or another one, or the disk refuses. What
            had come is removed; what a killed process left is called `.part` and removed by a later download.
    """
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_parts(target)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        part = Path(name)
        with os.fdopen(handle, "wb") as file:
            _fetch(url, file.write, sha256, on_progress)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(target)
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise CheckpointError(f"downloading {url} failed ({_reason(error)})") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def progress_on_terminal(done: int, total: int) -> None:
    """One line on standard error that counts megabytes, where that is a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        sys.stderr.write(f"\rdownloading the weights of Inception: {done / 1e6:.0f} of {total / 1e6:.0f} MB{end}")
        sys.stderr.flush()


def _fetch(url: str, write: Callable[[bytes], object], sha256: str, on_progress: OnProgress | None) -> None:
    """Write what the server sends, and compare it with the hash."""
    digest, done = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:  # noqa: S310  (the address is a constant of ours)
        total = int(answer.headers.get("Content-Length") or BYTES)
        while piece := answer.read1(_PIECE):
            write(piece)
            digest.update(piece)
            done += len(piece)
            if done > total:
                break
            if on_progress is not None:
                on_progress(done, total)
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{url} gave {done:,} of {total:,} bytes with the SHA-256 {digest.hexdigest()}, expected {sha256}; "
            "the connection broke, or something on the way puts its own page there"
        )


def _remove_stale_parts(target: Path) -> None:
    for part in target.parent.glob(f".{target.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process may clean up at the same time
            if time.time() - part.stat().st_mtime > _STALE:
                part.unlink()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it is an open answer as well
        return f"the server says {error.code} {error.reason}"
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split()) or type(inner).__name__


def _sha256(path: Path) -> str:
    return read_record(path).sha256
