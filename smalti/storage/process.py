"""Who writes: a process named so that anyone can later tell whether it still runs."""

import os
import re
import socket
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

_TOKEN = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})-(\d+)-(\d+)")


@dataclass(frozen=True)
class Process:
    """A process id alone is used again after a while; with boot and start time it names one process for good."""

    pid: int
    host: str
    boot_id: str  # changes with every boot, and is shared by the containers of a machine
    started: int  # clock ticks since boot; 0 where the system does not tell

    @classmethod
    def current(cls) -> "Process":
        return cls(os.getpid(), socket.gethostname(), _boot_id(), _started(os.getpid()) or 0)

    @property
    def token(self) -> str:
        """A short form for file names."""
        return f"{_digest(self.host)}-{_digest(self.boot_id)}-{self.pid}-{self.started}"


def is_dead(token: str) -> bool | None:
    """Whether the process behind a token has ended; None if it ran on another machine, where nobody here can look."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    host, boot, pid, started = match[1], match[2], int(match[3]), int(match[4])
    here = Process.current()
    if boot == _digest(here.boot_id):
        return not _runs(pid, started)
    return True if host == _digest(here.host) else None  # same machine, booted since


def _runs(pid: int, started: int) -> bool:
    if sys.platform == "linux":
        return _started(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> int | None:
    """Start time in clock ticks since boot; None if there is no such process, or only its unburied remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold blanks and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]
