"""Being asked to stop: the handler only sets a flag, and the run ends itself at the next step boundary."""

import signal
import threading
from types import FrameType, TracebackType

GRACE = 30.0  # seconds that torchrun, Kubernetes and Slurm leave between SIGTERM and SIGKILL unless told otherwise


class StopRequest:
    """Notices SIGTERM, SIGUSR1 and Ctrl-C inside a `with` block; a second Ctrl-C interrupts at once."""

    signals = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def outlasts_the_grace(save_seconds: float) -> str | None:
    """One line of advice where a save may not be done before a preempted process is killed; None where it will.

    Args:
        save_seconds: of the last save, from its begin to the last byte on the disk. Twice that is reckoned with: a stop
            may come while another save is under way.
    """
    if 2 * save_seconds <= GRACE:
        return None
    return (
        f"a save took {save_seconds:.0f} s: a run that is told to stop may need twice that, and most launchers kill "
        f"after {GRACE:.0f} s. More: torchrun --shutdown-timeout, Slurm --signal, terminationGracePeriodSeconds"
    )
