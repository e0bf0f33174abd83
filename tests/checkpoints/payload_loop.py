"""Read each file of a folder as `smalti convert` would, each in a fork, and say what happened. Not a test by itself.

The parent imports torch once, so that a file costs some hundredths of a second. In the child an audit hook counts
everything that reading weights has no business to do; the guard of the reading process itself is left out on request,
so that the count is that of the layers below it.
"""

import json
import os
import sys
from pathlib import Path

import torch

from smalti.storage import unpickle

WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "exec",
    "compile",
    "os.remove",
)


def read(path, guarded, out):
    torch.set_num_threads(1)
    unpickle.limit(path.stat().st_size)
    unpickle._warm_up()
    events = []

    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & unpickle._WRITING
        if writes or event.startswith(WATCHED):
            events.append(f"{event} {arguments!r}"[:200])

    if guarded:
        unpickle.forbid()
        sys.addaudithook(lambda event, arguments: hook(event, arguments))
    else:
        sys.addaudithook(hook)
    said = unpickle.answer(str(path), "auto", out)
    return said | {"events": list(events)}


def main():
    folder, guarded = Path(sys.argv[1]), sys.argv[2] == "guarded"
    unpickle._warm_up()
    results = {}
    for path in sorted(folder.iterdir()):
        receive, send = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(receive)
            try:
                out = os.open(os.devnull, os.O_WRONLY)
                said = read(path, guarded, out)
            except BaseException as error:  # noqa: BLE001  (the child must answer and end)
                said = {"broke": repr(error)}
            os.write(send, json.dumps(said).encode()[:60000])
            os._exit(0)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            text = pipe.read()
        status = os.waitpid(pid, 0)[1]
        results[path.name] = json.loads(text) if text else {"died": status}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
