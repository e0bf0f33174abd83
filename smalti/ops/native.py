"""C sources of this package as ctypes libraries, compiled on the user's machine at their first use and then kept.

Nothing is built when smalti is installed or imported. A machine without a compiler gets a reason instead of a library.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

# Beyond -O3: no errno and no floating-point exceptions, which nobody here reads. Neither changes a result, as other
# parts of -ffast-math would: sums keep their order, NaN and infinities their meaning.
_COMMON = ("-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# In order of preference: compilers differ in what they know.
_VARIANTS = (
    ("-march=native", "-fopenmp", "-fopenmp-simd"),
    ("-mcpu=native", "-fopenmp", "-fopenmp-simd"),
    ("-march=native", "-fopenmp-simd"),
    ("-mcpu=native", "-fopenmp-simd"),
    ("-fopenmp-simd",),
    (),
)
_COMPILE_SECONDS = 300

_lock = threading.Lock()
_loaded: dict[Path, "Native"] = {}


@dataclass(frozen=True)
class Native:
    """A library, or the reason why there is none and what to do about it."""

    library: ctypes.CDLL | None
    reason: str = ""


def load_native(source: Path) -> Native:
    """Compile a C file, or take what an earlier process compiled from the same text, compiler, flags and processor.

    Asked once per process and file; later calls return the same answer. Safe in several threads and processes at once:
    files appear under their final name in one piece.
    """
    with _lock:
        if source not in _loaded:
            _loaded[source] = _build(source)
        return _loaded[source]


def cache_folder() -> Path:
    """Where compiled libraries are kept: the platform's folder for caches of this user."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "smalti"


def _build(source: Path) -> Native:
    compiler = shutil.which("cc")
    if compiler is None:
        return Native(None, "there is no C compiler: install one that answers to 'cc', such as gcc or clang")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Native(None, f"the C compiler {compiler} does not run: {_one_line(error)}; mend or reinstall it")
    try:
        text = source.read_bytes()
    except OSError as error:
        return Native(None, f"its source cannot be read: {_one_line(error)}; install smalti again")
    identity = b"\0".join((text, version.encode(), _processor().encode()))
    stems = {
        flags: f"{source.stem}-{hashlib.sha256(' '.join(flags).encode() + identity).hexdigest()[:20]}"
        for flags in _VARIANTS
    }
    folder = _private_folder()
    for stem in stems.values():
        if (library := _kept(folder, stem)) is not None:
            return Native(library)
    complaint = ""
    for flags, stem in stems.items():
        try:
            return Native(_compile([compiler, *_COMMON, *flags], source, folder, stem))
        except (OSError, subprocess.SubprocessError) as error:
            complaint = complaint or _one_line(error)
    return Native(None, f"{compiler} cannot compile {source.name}: {complaint}")


def _private_folder() -> Path:
    """The cache folder; a folder of this process where that cannot be written, or where others could write too."""
    folder = cache_folder()
    if _is_ours(folder):
        return folder
    return Path(tempfile.mkdtemp(prefix="smalti-"))


def _is_ours(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        with tempfile.TemporaryFile(dir=folder):
            return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    except OSError:
        return False


def _kept(folder: Path, stem: str) -> ctypes.CDLL | None:
    """The library of this stem. Its name ends in a hash of its content: to load a damaged one may kill the process."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        try:
            if path.name == _name(stem, path.read_bytes()):
                return ctypes.CDLL(str(path))
        except OSError:  # taken away meanwhile, or not loadable here: compile anew
            continue
    return None


def _compile(command: list[str], source: Path, folder: Path, stem: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as room:
        fresh = Path(room) / "library.so"
        run = subprocess.run(
            [*command, str(source), "-o", str(fresh), "-lm"],
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
        )
        if run.returncode != 0:
            raise OSError((run.stderr.strip() or f"exit status {run.returncode}").splitlines()[0])
        path = folder / _name(stem, fresh.read_bytes())
        os.replace(fresh, path)
    return ctypes.CDLL(str(path))


def _name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:20]}.so"


def _processor() -> str:
    """What tells two machines apart that share a home folder: a library made for one may not run on the other."""
    about = [platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        about += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join(about)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
