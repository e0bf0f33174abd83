"""The table of benchmarks, and the choice between them."""

import importlib
import sys

from smalti.config import did_you_mean
from smalti.errors import SmaltiError

# Each is a module here with `main(arguments) -> exit code`.
BENCHMARKS = {
    "data": "samples a second of folders, tar shards and latents, beside plain Pillow decoding",
    "ema": "how long the weight average should remember, by validation loss of one short run",
    "evaluation": "moments, precision and recall, density of 50,000 images: time in floors, peak memory",
    "features": "feature networks: images per second, and their resize alone, beside the floor of their multiply-adds",
    "mixers": "every mixer alone against scaled_dot_product_attention, 256 to 16,384 tokens",
    "model": "any preset: parameters, GMACs, forward and training step in floors, peak memory",
    "ops": "every op and twin: checked against its reference, then timed, with and without gradients",
    "overhead": "data, optimizer and average, log, checkpoints: each as a share of the training step",
    "recipe": "the demo's recipe beside what else was tried: loss after equal images",
    "scale": "the index of 1.3 and 14 million made-up images: time and memory to open, split and order",
    "seeds": "the demo's networks trained with several seeds: validation loss, its spread, and the lines beside it",
}


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:10} {what}" for name, what in BENCHMARKS.items())
        sys.stdout.write(f"usage: python -m benchmarks NAME [options]; NAME --help shows them\n\n{rows}\n")
        return 0
    name, *rest = arguments
    if name not in BENCHMARKS:
        sys.stderr.write(f"no benchmark {name!r}{did_you_mean(name, BENCHMARKS)}\n")
        return 64
    try:
        return importlib.import_module(f"benchmarks.{name}").main(rest)
    except SmaltiError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
