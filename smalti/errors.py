"""What a user can mend: one clear line each. Anything that is not a SmaltiError is a bug and shows its traceback."""


class SmaltiError(Exception):
    """Something the user can fix. The message says what came, what was expected and what to do.

    `exit_code` follows the sysexits convention, so that scripts and job schedulers can tell the cases apart.
    """

    exit_code = 2


class ConfigError(SmaltiError, ValueError):
    """A setting, a name or an argument is wrong."""

    exit_code = 64


class DataError(SmaltiError, ValueError):
    """Images, labels or a data folder are not usable."""

    exit_code = 65


class CheckpointError(SmaltiError, ValueError):
    """A checkpoint is damaged, of another model, or not of a kind that is safe to read."""

    exit_code = 65


class NumericError(SmaltiError):
    """Training met too many losses that are not finite, and stopped before harming the weights."""

    exit_code = 70


class RunLockedError(SmaltiError):
    """Another process is writing to the same run folder."""

    exit_code = 73


class StorageError(SmaltiError, OSError):
    """The disk is full, or it refused to write. What was stored before is untouched."""

    exit_code = 74


class PreemptedError(SmaltiError):
    """The run was asked to stop, saved itself at a step boundary, and continues when it is started again.

    Args:
        signal_name: what asked, as in `SIGTERM`.
    """

    exit_code = 75

    def __init__(self, message: str, signal_name: str = "") -> None:
        super().__init__(message)
        self.signal_name = signal_name


class PeerLostError(SmaltiError):
    """Another process of the run ended or no longer answers; what was stored stands, so start the run again."""

    exit_code = 75
