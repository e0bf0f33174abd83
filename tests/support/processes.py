"""Programs beside the tests that fork, kill and wait: how a test runs one, how such a program waits, and its processes.

Forks of a Python that has imported torch already: several processes of one run without the price of `torchrun`.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
PATIENCE = 120.0  # seconds for what takes one on an idle machine


# --- the test's side


def output_of(program, *arguments, seconds=270.0, environment=()):
    """What a program prints. The test fails with the program's own words as soon as it does, or is not done in time.

    It may write to files only, so that whoever it leaves behind holds up nobody; and that is ended with it.
    """
    paths = [TESTS.parent, TESTS / "support", TESTS / "workflows", os.environ.get("PYTHONPATH")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "SECONDS_FOR_THE_PROGRAM": str(seconds),
        **dict(environment),
    }
    command = [sys.executable, "-W", "ignore", str(program), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
        try:
            code = process.wait(seconds + 10)  # by then it has said itself where it stands
        finally:
            _end_session(process.pid)
            process.wait()
        out.seek(0), err.seek(0)
        said, complained = out.read(), err.read()
    assert code == 0, f"{Path(program).name} {arguments} ended with {code}:\n{said}\n{complained}"
    return said


def _end_session(leader):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    for stat in Path("/proc").glob("[0-9]*/stat"):  # also those in a group of their own
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)


# --- the program's side


def begin(*modules):
    """What a program does first: import, once for all children, what they need; and end when nobody waits any more."""
    torch.set_num_threads(1)
    end_with_parent(os.getppid())
    if seconds := os.environ.get("SECONDS_FOR_THE_PROGRAM"):
        faulthandler.dump_traceback_later(float(seconds), exit=True)
    for module in modules:
        importlib.import_module(module)


def end_with_parent(parent):
    """Have the kernel end this process together with its parent, where the kernel can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was quicker
            os._exit(1)


def running(pid):
    """Whether a child has not ended yet; its exit code may still be asked for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_until(condition, what, pids=(), seconds=PATIENCE):
    """Wait for `condition()`, and give up with a word when it does not come or one of these children has ended."""
    end = time.monotonic() + seconds
    while not condition():
        gone = [pid for pid in pids if not running(pid)]
        if gone and not condition():
            raise AssertionError(f"{what}: did not come before process {gone[0]} ended")
        if time.monotonic() > end:
            raise AssertionError(f"{what}: did not come within {seconds:.0f} s")
        time.sleep(0.002)


_ports = itertools.count()


def free_port() -> int:
    """A port below those that the kernel deals out, and of this process alone: nobody takes it before it is used."""
    for k in itertools.islice(_ports, 1000):
        port = 12000 + (os.getpid() * 64 + k) % 16000
        with socket.socket() as s, contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Crew:
    """Forks that `work(rank)`, each described to itself as `torchrun` would; what it prints goes to `log`."""

    def __init__(self, size, work, log):
        port, parent = free_port(), os.getpid()
        self.size, self.pids = size, []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                end_with_parent(parent)
                self._run(rank, port, work, log)
            self.pids.append(pid)

    def _run(self, rank, port, work, log):
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with log.with_name(f"{log.name}-{rank}.txt").open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            faulthandler.enable()
            where = {"RANK": rank, "WORLD_SIZE": self.size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.size}
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in where.items()}
            if self.size == 1:
                for name in where:
                    del os.environ[name]
            code = work(rank) or 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:  # noqa: BLE001  (a fork must not return to the parent's code)
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, timeout=PATIENCE):
        """Exit codes, negative = the signal that ended it; who is late says where it stands and is killed."""
        codes, end, asked = {}, time.monotonic() + timeout, False
        while len(codes) < self.size:
            for rank, pid in enumerate(self.pids):
                if rank not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[rank] = os.waitstatus_to_exitcode(status)
                    elif time.monotonic() > end:
                        os.kill(pid, signal.SIGKILL if asked else signal.SIGABRT)
            if time.monotonic() > end:
                asked, end = True, time.monotonic() + 5
            time.sleep(0.005)
        return [codes[rank] for rank in range(self.size)]
