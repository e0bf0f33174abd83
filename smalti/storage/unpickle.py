"""The process in which a stranger's pickle is read: no code from it runs, and what could go wrong stays inside.

`torch.load(weights_only=True)` makes tensors and plain containers only. It is not a sandbox, so it runs in a process
of its own that may not open files for writing, start programs, reach a network, or use more memory and time than the
file's size explains. What comes out goes through safetensors, and is looked at again as a stranger's file.

Run as a program: arguments are the path, the part wanted, and the number of an open file for the tensors; one line of
JSON on standard output says how it went.
"""

import io
import json
import math
import os
import resource
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.storage.tensors import file_pieces

PARTS = ("ema", "model", "state_dict")  # in order of preference, as released training scripts name them

_SPARE = 1 << 30  # bytes of memory beside the file's own
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.putenv",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "subprocess.", "pty.", "socket.", "shutil.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "exec",
    "compile", "ctypes.", "sys.addaudithook", "builtins.input", "pickle.find_class", "marshal.loads",
)  # fmt: skip


class Namespace:
    """Stands in for argparse.Namespace, in which released scripts store their settings: holds values, does nothing."""


class Refused(Exception):  # noqa: N818  (it is an answer, not a mishap)
    """The file is not what is read here; the message ends a sentence that begins with its name."""


def extract(path: str, wanted: str) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The wanted weights of a file that `torch.save` wrote.

    Args:
        wanted: "auto" takes the moving average, else the model, else the whole file; or one of these by name.

    Returns:
        The part taken ("plain" for the whole file), its tensors, and the plain values of the settings beside them.

    Raises:
        Refused: there is no such part, or it is not made of named tensors. Anything else: the file is damaged.
    """
    # Files from before torch 1.6 are no archives, and cannot be mapped.
    with torch.serialization.safe_globals([(Namespace, "argparse.Namespace")]):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(loaded, dict):
        raise Refused(f"holds one {type(loaded).__name__}, not a table of tensors")
    inside = [part for part in PARTS if isinstance(loaded.get(part), Mapping)]
    if wanted != "auto" and wanted not in inside:
        raise Refused(f"has no part {wanted!r}: it holds {', '.join(inside) or 'plain weights only'}")
    part = wanted if wanted != "auto" else (inside or ["plain"])[0]
    tensors = dict(loaded if part == "plain" else loaded[part])
    _check_tensors(tensors, os.stat(path).st_size)
    settings = loaded.get("args") if part != "plain" else None
    return part, tensors, _plain_values(settings)


def _check_tensors(tensors: dict[Any, Any], size: int) -> None:
    if not tensors:
        raise Refused("holds no tensors")
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 512:
            raise Refused("holds a tensor without a printable name")
        if type(tensor) not in (Tensor, nn.Parameter):
            raise Refused(f"holds {name} = a {type(tensor).__name__} among its tensors")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise Refused(f"holds {name} in a form that is no plain tensor ({tensor.layout}, {tensor.device})")
        total += math.prod(tensor.shape) * tensor.element_size()
    if total > 2 * size:  # two names may share one tensor; a few bytes blown up to terabytes are an attack
        raise Refused(f"has {size:,} bytes, its tensors would have {total:,}")


def _plain_values(settings: Any) -> dict[str, Any]:
    """Numbers and short texts of a settings object; the rest of what a script kept there is of no use here."""
    values = vars(settings) if isinstance(settings, Namespace) else settings
    if not isinstance(values, dict):
        return {}
    simple = lambda value: value is None or type(value) in (bool, int, float, str)  # noqa: E731
    kept = {k: v for k, v in values.items() if isinstance(k, str) and k.isprintable() and simple(v)}
    return {k: v for k, v in kept.items() if not isinstance(v, str) or (v.isprintable() and len(v) <= 200)}


def limit(size: int) -> None:
    """Memory, processor time and written bytes that a file of this size can explain."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 60 + size // (20 << 20))
    _lower(resource.RLIMIT_FSIZE, 2 * size + (64 << 20))
    _lower(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + 3 * size + _SPARE)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def forbid() -> None:
    """From here on this process may compute and read, nothing else. For good: there is no way back."""
    _warm_up()
    sys.addaudithook(_guard)


def _warm_up() -> None:
    """Read one small file of our own: what torch imports only when it reads would be stopped as running code."""
    sample = {"model": {"a": torch.zeros(1), "b": nn.Parameter(torch.zeros(1))}, "args": Namespace()}
    buffer = io.BytesIO()
    torch.save(sample, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([Namespace]):
        again = torch.load(buffer, weights_only=True)
    b"".join(file_pieces(again["model"]))


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or event.startswith(_FORBIDDEN):
        raise PermissionError(f"reading weights must not do {event}")


def answer(path: str, wanted: str, out: int) -> dict[str, Any]:
    """Write the tensors to an open file; what is returned says how it went."""
    try:
        part, tensors, settings = extract(path, wanted)
        for piece in file_pieces(tensors):
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(out, rest) :]
    except Refused as error:
        return {"refused": str(error)}
    except OSError as error:
        return {"errno": error.errno, "damaged": str(error)[:300]}
    except Exception as error:  # noqa: BLE001  (whatever a stranger's file brings about is an answer about that file)
        return {"damaged": f"{type(error).__name__}: {error}"[:4000], "globals": _asked_for(path)}
    return {"part": part, "settings": settings}


def _asked_for(path: str) -> list[str]:
    """Names of code that the pickle asks for; nothing is run to find them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  (it was unreadable before; the first error is the one to tell)
        return []
    return sorted({name for name in names if name.isprintable() and name != "argparse.Namespace"})[:8]


def main() -> None:
    """The program."""
    path, wanted, out = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    limit(os.stat(path).st_size)
    forbid()
    print(json.dumps(answer(path, wanted, out)))
