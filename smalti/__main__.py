"""`python -m smalti` is the command `smalti`, also under `torchrun -m`."""

import sys

from smalti.cli import main

if __name__ == "__main__":
    sys.exit(main())
