"""Run by test_crafted_files.py in a process of its own, whose memory is watched: refuse files made to do harm.

Arguments: the folder of the test that made them, and an empty one. Prints one JSON object: per file the error, the
seconds of processor time, and the bytes by which the process grew at most while it looked.
"""

import importlib
import json
import sys
import time
import warnings
import zipfile
from pathlib import Path

import torch
from processes import begin

from smalti.checkpoints.foreign import read_foreign
from smalti.errors import CheckpointError
from smalti.storage.precheck import MAX_MEMBERS


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (int(line.split()[1]) for line in lines if line.startswith(name))
    return value * 1024


def look(path):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what comes now
    before, started = memory("VmRSS"), time.process_time()
    try:
        read_foreign(path)
        said = ""
    except CheckpointError as error:
        said = str(error)
    return {"said": said, "seconds": time.process_time() - started, "grew": memory("VmHWM") - before}


def bombs(folder, test):
    """An archive of 300 MiB in a third of one, one of very many members, tables of very many and very large tensors."""
    test.archive(folder / "packed.pt", b"\0" * (300 << 20), compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(folder / "members.pt", "w") as file:
        for i in range(MAX_MEMBERS + 1):
            file.writestr(f"archive/data/{i}", b"")
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (folder / "tensors.safetensors").write_bytes(test.header({f"{i}": empty for i in range(100_000)}))
    blown = {"a": torch.zeros(1).expand(1 << 40)}
    torch.save(blown, folder / "blown.pt")


if __name__ == "__main__":
    begin()
    warnings.simplefilter("ignore")
    sys.path.insert(0, sys.argv[1])
    test, folder = importlib.import_module("test_foreign"), Path(sys.argv[2])
    for name, content in test.HEADERS.items():
        (folder / f"header-{name}.safetensors").write_bytes(content)
    bombs(folder, test)
    torch.save(test.GOOD, folder / "warm.pt")
    look(folder / "warm.pt")  # whatever a first look brings in belongs to none of them
    found = {path.name: look(path) for path in sorted(folder.iterdir()) if path.name != "warm.pt"}
    print(json.dumps(found))
