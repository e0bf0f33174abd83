"""`python -m smalti.cli.launched FOLDER VERB ...`: what a launcher's script has `torchrun` start in each process.

The same as `smalti VERB ...`, and its process id and exit code stand in FOLDER, for `torchrun` keeps the codes of its
processes to itself. A process that is killed leaves no code.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from smalti.cli import main


def launched(arguments: Sequence[str]) -> int:
    """Run the command after the folder; its exit code, which is also written down."""
    folder, rank = Path(arguments[0]), os.environ["LOCAL_RANK"]
    (folder / f"{rank}.pid").write_text(f"{os.getpid()}\n")
    code = 1  # of an exception that nobody caught
    try:
        code = main(arguments[1:])
    except SystemExit as end:  # from the reader of flags
        code = end.code if isinstance(end.code, int) else 1
    finally:
        (folder / f"{rank}.code").write_text(f"{code}\n")
    return code


if __name__ == "__main__":
    sys.exit(launched(sys.argv[1:]))
