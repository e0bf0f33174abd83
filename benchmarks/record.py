"""What stands around a number: the machine, the versions and the code that made it; JSON lines and tables.

Flags are plain argparse: the machines worth measuring are often those on which little can be installed.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import smalti
from smalti.config import did_you_mean
from smalti.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_common_options(parser: argparse.ArgumentParser, *, precisions: Sequence[str] = tuple(DTYPES)) -> None:
    """Options that every benchmark has."""
    parser.add_argument("--precision", nargs="+", choices=precisions, default=["fp32"], help="some (default fp32)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default cpu)")
    parser.add_argument(
        "--threads", type=positive, default=1, help="CPU threads; 1 reads CPU time, more read wall time"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="timed samples; the median counts (default 5)")
    parser.add_argument("--out", type=Path, help="file to append the JSON lines to")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def prepare(options: argparse.Namespace) -> torch.device:
    """Set the threads and find the device.

    Raises:
        ConfigError: the device is not here.
    """
    torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise ConfigError(f"device {options.device!r}{did_you_mean(options.device, ['cpu', 'cuda', 'mps'])}") from error
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= present.get(device.type, 0):
        raise ConfigError(f"device {options.device!r} is not on this machine; use --device cpu")
    return device


class Recorder:
    """Prints each row as a JSON line as soon as it is known, appends it to a file, and keeps it for the table."""

    def __init__(self, benchmark: str, device: torch.device, out: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._head = {"benchmark": benchmark, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self._head |= environment(device)
        self._out = out
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **values: Any) -> None:
        """One result; the same machine and versions go into each line, so that a line can stand alone."""
        self.rows.append(values)
        line = json.dumps(self._head | values)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and code, for a JSON line."""
    commit, dirty = _commit()
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "smalti": smalti.__version__,
        "commit": commit,
        "dirty": dirty,
        "tree": git_tree_id(ROOT / "smalti"),
    }


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_tree_id(folder: Path) -> str:
    """The id that git gives to a folder's contents, found without git, which measured machines often lack.

    Equal to `git rev-parse COMMIT:smalti` for the commit that was measured, whether or not git or its history is here.
    Caches of Python are left out, as git leaves them out.
    """
    return _tree(folder).hex()


def _tree(folder: Path) -> bytes:
    entries = []
    for path in folder.iterdir():
        if path.name == "__pycache__" or path.suffix in (".pyc", ".tmp"):
            continue
        if path.is_dir():
            entries.append((path.name + "/", b"40000 " + path.name.encode() + b"\0" + _tree(path)))
        else:
            mode = b"100755 " if path.stat().st_mode & 0o100 else b"100644 "
            entries.append((path.name, mode + path.name.encode() + b"\0" + _object_id(b"blob", path.read_bytes())))
    return _object_id(b"tree", b"".join(data for _, data in sorted(entries)))


def _object_id(kind: bytes, data: bytes) -> bytes:
    return hashlib.sha1(kind + b" " + str(len(data)).encode() + b"\0" + data, usedforsecurity=False).digest()


def _commit() -> tuple[str | None, bool | None]:
    """The commit and whether smalti/ differs from it; None, None where there is no git or no history."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "smalti", "benchmarks"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None, None
    return head.stdout.strip(), bool(status.stdout.strip())


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton  # only where it is: it needs a GPU to be of use

    return triton.__version__


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text: the first ones left, numbers right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in (lines[0], "  ".join("-" * w for w in widths), *lines[1:])) + "\n"


def _is_number(text: str) -> bool:
    return text in ("", "-") or text.replace(".", "", 1).replace(",", "").isdigit()
