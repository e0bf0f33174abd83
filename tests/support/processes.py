"""Several processes of one run without the price of `torchrun`: forks of a Python that has imported torch already."""

import os
import signal
import socket
import sys
import time
import traceback


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Crew:
    """Forks that `work(rank)`, each described to itself as `torchrun` would; what it prints goes to `log`."""

    def __init__(self, size, work, log):
        port = free_port()
        self.size, self.pids = size, []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                self._run(rank, port, work, log)
            self.pids.append(pid)

    def _run(self, rank, port, work, log):
        code = 99
        try:
            with log.with_name(f"{log.name}-{rank}.txt").open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
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

    def wait(self, timeout=120.0):
        """Exit codes, negative = the signal that ended it; whoever is not done in time is killed."""
        codes, end = {}, time.monotonic() + timeout
        while len(codes) < self.size:
            for rank, pid in enumerate(self.pids):
                if rank not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[rank] = os.waitstatus_to_exitcode(status)
                    elif time.monotonic() > end:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        return [codes[rank] for rank in range(self.size)]
