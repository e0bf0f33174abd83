"""Weights from strangers: what a file holds, found out without running anything that it says.

safetensors files have a header that is checked to the byte. Files of `torch.save` are pickles in a zip archive: the
archive is checked first, and the pickle is read in a process of its own (see `smalti.storage.unpickle`).
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from smalti.errors import CheckpointError, StorageError
from smalti.storage.precheck import check_safetensors, check_size, check_zip
from smalti.storage.tensors import read_tensors

Part = Literal["auto", "ema", "model"]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_SAFE = "ask for it as safetensors, or load it where you trust it and save its state_dict as safetensors"
_MARKS = (  # offset, bytes, what it is
    (0, b"GGUF", "a GGUF file, whose quantised tensors are not read"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (0, b"\x93NUMPY", "a numpy array"),
    (0, b"\x1f\x8b", "gzipped: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-packed: unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z-packed: unpack it first"),
    (257, b"ustar", f"a tar archive, torch's oldest form, which can run code when it is read: {_SAFE}"),
    (0, b"\x80", f"a bare pickle, torch's form before 1.6, which can run code when it is read: {_SAFE}"),
)
_OLD_FORM = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch's number for it, pickled
# The process finds smalti where this one did, whatever its working directory and environment say.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from smalti.storage import isolate; isolate.leave_network(); "
    "from smalti.storage.unpickle import main; main()"
)


@dataclass(frozen=True)
class ForeignWeights:
    """What a stranger's file holds.

    Args:
        part: ema, model or state_dict, as the file names it; plain if the file is nothing but weights.
        settings: plain values of the `args` that a training script stored beside them.
    """

    tensors: dict[str, Tensor]
    part: str
    settings: Mapping[str, Any]


def read_foreign(path: Path, part: Part = "auto", *, old_form: bool = False) -> ForeignWeights:
    """Read `.safetensors`, or `.pt`, `.pth`, `.bin` as `torch.save` writes them since 1.6.

    Args:
        part: which weights of a training checkpoint; auto = the moving average if there is one.
        old_form: also read what torch wrote before 1.6, a bare pickle. It cannot be looked at before it is read, though
            it is read apart and without running code, too: for files that are known by their hash.

    Raises:
        CheckpointError: it is of another kind, damaged, asks for code, or has no such part.
        StorageError: there is no room for the copy that is made on the way, in the folder for temporary files.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(_about_folder(path))
    size = check_size(path)
    with path.open("rb") as file:
        start = file.read(512)
    if path.suffix.lower() not in _SUFFIXES:
        known = _recognise(start)
        extra = f"; this is {known}" if known else f"; {_SAFE}" if path.suffix.lower() in (".ckpt", ".pkl") else ""
        raise CheckpointError(f"{path} is of no kind that is read here ({', '.join(_SUFFIXES)}){extra}")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        check_zip(path)
        return _read_apart(path, part, size)
    if old_form and start.startswith(_OLD_FORM):
        return _read_apart(path, part, size)
    if path.suffix.lower() != ".safetensors" and (known := _recognise(start)):
        raise CheckpointError(f"{path} is {known}")
    if path.suffix.lower() != ".safetensors" and start[8:9] != b"{":
        raise CheckpointError(f"{path} is neither an archive of torch.save nor a safetensors file: {_SAFE}")
    return _from_safetensors(path, part)


def _from_safetensors(path: Path, part: Part) -> ForeignWeights:
    check_safetensors(path)
    if part != "auto":
        raise CheckpointError(f"{path} has no part {part!r}: a safetensors file holds plain weights only")
    try:
        return ForeignWeights(read_tensors(path), "plain", {})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_apart(path: Path, part: Part, size: int) -> ForeignWeights:
    with tempfile.TemporaryDirectory(prefix="smalti-") as folder:
        copy = Path(folder) / "weights.safetensors"
        with copy.open("xb") as out:
            said = _ask(path.resolve(), part, out.fileno(), size)
        if "refused" in said:
            raise CheckpointError(f"{path} {said['refused']}")
        if said.get("errno") is not None and said["errno"] in _NO_ROOM:
            raise StorageError(
                f"{folder} has no room for a copy of {path} ({os.strerror(said['errno'])}): it may need {size:,} "
                "bytes; set TMPDIR to a folder on a larger disk"
            )
        if said.get("globals"):
            raise CheckpointError(
                f"{path} asks for code when it is read ({', '.join(said['globals'])}), which no weights need: {_SAFE}"
            )
        if "damaged" in said:
            raise CheckpointError(f"{path} is damaged or no checkpoint of weights: {_one_line(said['damaged'])}")
        check_safetensors(copy)
        return ForeignWeights(read_tensors(copy), said["part"], said["settings"])


_NO_ROOM = (27, 28, 122)  # EFBIG, ENOSPC, EDQUOT


def _ask(path: Path, part: str, out: int, size: int) -> dict[str, Any]:
    """Run the reading process and hear what it says."""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-P", "-W", "ignore", "-c", _PROGRAM, root, str(path), part, str(out)]
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        run = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=[out],
            env=os.environ | quiet,
            timeout=300 + size / (10 << 20),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{path} took too long to read: it is damaged, or made to be slow") from error
    if run.returncode < 0:
        name = signal.Signals(-run.returncode).name
        raise CheckpointError(f"{path} broke the process that read it ({name}): it is damaged, or made to do harm")
    try:
        said = json.loads(run.stdout)
    except ValueError:
        said = None
    if run.returncode or not isinstance(said, dict):
        last = run.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
        raise CheckpointError(f"{path} could not be read; the process that tried ended with: {_one_line(last[0])}")
    return said


def _recognise(start: bytes) -> str:
    for offset, mark, what in _MARKS:
        if start[offset : offset + len(mark)] == mark:
            return what
    return ""


def _about_folder(path: Path) -> str:
    if (path / ".metadata").exists() or next(path.glob("*.distcp"), None):
        return f"{path} is a folder of torch.distributed.checkpoint, which can run code when it is read: {_SAFE}"
    if (path / "config.json").exists():
        return f"{path} is a model folder, not a file: name what it is, smalti or diffusers, instead of a repository"
    return f"{path} is a folder: give the file with the weights ({', '.join(_SUFFIXES)})"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:300]
