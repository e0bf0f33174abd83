"""Run by test_processes.py in a process of its own, because it forks: one small run shared by several processes.

Prints one JSON object per part that was asked for. The parent imports torch once; every child runs the real command.
"""

import hashlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from processes import PATIENCE, Crew, begin, running, wait_until
from stop_loop import log_of
from tiny_runs import flags, write_set

import smalti.workflows.train as workflow
from smalti.checkpoints import CheckpointStore
from smalti.cli import main
from smalti.storage.tensors import tensors_digest
from smalti.training import batches, loop
from smalti.training.distributed import whole

SHORT, LONG = 4.0, 30.0  # what `hung` waits for a process, and `killed` where it is not told of a death
FAST = ("--batch-size", "10", "--optimizer.learning-rate", "0.001")


class Watched(Crew):
    """`smalti train` by several processes, each of which writes down its steps and the positions it trained on.

    At the end of the step `limit` all wait for the file `go`, should what is to happen to them be late.
    """

    def __init__(self, root, name, size, arguments, prepare=lambda rank: None, limit=None):
        self.folder, self.limit = root / f"{name}-seen", limit
        self.go = self.folder / "go"
        self.folder.mkdir(exist_ok=True)
        super().__init__(size, lambda rank: self._train(rank, arguments, prepare), root / name)

    def _train(self, rank, arguments, prepare):
        real, at, seen = workflow.train_steps, batches.BatchSource.at, []
        told = (self.folder / f"{rank}.jsonl").open("a", buffering=1)

        def watch(source, start, count):
            seen.append([start, count])
            return at(source, start, count)

        def steps(*args):
            for report in real(*args):
                told.write(json.dumps({"step": report.step, "seen": seen, "skipped": report.skipped}) + "\n")
                seen.clear()
                while report.step == self.limit and not self.go.exists():
                    time.sleep(0.002)
                yield report

        batches.BatchSource.at = watch
        workflow.train_steps = steps
        workflow.tensorboard_installed = lambda: False
        prepare(rank)
        return main(arguments)

    def steps(self, rank=0):
        path = self.folder / f"{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_step(self, step):
        wait_until(lambda: any(line["step"] >= step for line in self.steps()), f"step {step}", self.pids)


def samples(root, name, size):
    """step -> the positions that all processes together counted, as far as their shares tell."""
    found = {}
    for rank in range(size):
        path = root / f"{name}-seen" / f"{rank}.jsonl"
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], set()).update(p for a, n in line["seen"] for p in range(a, a + n))
    return found


def weights(out):
    newest = CheckpointStore(out / "checkpoints").load_newest(on_skip=print)
    return newest.step, {f"{g}.{n}": t for g, group in newest.tensors.items() for n, t in group.items()}


def difference(a, b):
    """Between the weights and averages of two runs; of moments it would mean little."""
    (step, a), (other, b) = weights(a), weights(b)
    names = [name for name in a if not name.startswith("optimizer.")]
    same_keys = a.keys() == b.keys()
    return {"steps": step == other, "names": same_keys, "far": max((a[n] - b[n]).abs().max().item() for n in names)}


def text(root, name, rank):
    return (root / f"{name}-{rank}.txt").read_text()


def last_line(root, name, rank):
    return "".join(text(root, name, rank).strip().splitlines()[-1:])


def ladder(root, data):
    """One run by 1, 2, 3, 4, 2 and 1 processes in turn; another that one process makes alone."""
    steps = 20
    whole = flags(root / "whole", data, *FAST, "--steps", str(steps))
    codes = [Watched(root, "whole", 1, whole).wait(PATIENCE)]
    rungs = [
        (4, 1, "auto", ()),
        (7, 2, "fsdp", ()),
        (10, 3, "ddp", ()),
        (13, 4, "hsdp", ("--parallel.shard-size", "2")),
        (16, 3, "fsdp", ()),
        (18, 2, "ddp", ()),
        (20, 1, "auto", ()),
    ]
    for last, size, strategy, more in rungs:
        arguments = flags(root / "ladder", data, *FAST, "--steps", str(last), "--parallel.strategy", strategy, *more)
        codes.append(Watched(root, f"ladder{last}", size, arguments).wait(PATIENCE))
    whole_samples = samples(root, "whole", 1)
    seen = {}
    for last, size, *_ in rungs:
        seen |= samples(root, f"ladder{last}", size)
    loss = {line["step"]: line["loss"] for line in log_of(root / "whole") if line["event"] == "train"}
    ours = {line["step"]: line["loss"] for line in log_of(root / "ladder") if line["event"] == "train"}
    return {
        "codes": [code for some in codes for code in some],
        "samples": seen == whole_samples and len(seen) == steps,
        "losses": max(abs(loss[step] - ours[step]) / loss[step] for step in loss),
        "logged": sorted(ours) == sorted(loss),
        **difference(root / "whole", root / "ladder"),
    }


def killed(root, data, strategy):
    """Two processes, one of them killed again and again; each time the other must notice, and the next start go on."""
    rng = random.Random(3)
    base = (*FAST, "--steps", str(6 * KILLS + 6), "--parallel.strategy", strategy)
    base += ("--parallel.timeout-minutes", str(LONG / 60))
    whole = Watched(root, "whole", 2, flags(root / "whole", data, *base)).wait(PATIENCE)
    arguments, result = flags(root / "killed", data, *base), {"whole": whole, "codes": [], "seconds": [], "lines": []}
    for k in range(KILLS):
        step, victim = 6 * k + rng.randint(1, 5), k % 2
        crew = Watched(root, f"killed{k}", 2, arguments, limit=step + 1)
        crew.wait_for_step(step)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(crew.pids[victim], signal.SIGKILL)
        killed_at = time.monotonic()
        crew.go.touch()
        codes = crew.wait(PATIENCE)
        result["seconds"].append(round(time.monotonic() - killed_at, 2))
        result["codes"].append([codes[1 - victim], codes[victim]])
        result["lines"].append(last_line(root, f"killed{k}", 1 - victim))
    result["end"] = Watched(root, "killed-end", 2, arguments).wait(PATIENCE)
    return result | {"patience": LONG, "same": whole_state(root / "killed") == whole_state(root / "whole")}


def whole_state(out):
    """Every byte of the newest checkpoint and of the finished model."""
    newest = CheckpointStore(out / "checkpoints").load_newest(on_skip=print)
    files = [*newest.path.glob("*.safetensors"), newest.path / "state.json", out / "model" / "model.safetensors"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def hung(root, data):
    """One of two processes is stopped, as by a debugger or a dying disk: the other gives up when its patience ends."""
    arguments = flags(root / "hung", data, *FAST, "--steps", "500", "--parallel.timeout-minutes", str(SHORT / 60))
    crew = Watched(root, "hung", 2, arguments)
    crew.wait_for_step(3)
    os.kill(crew.pids[1], signal.SIGSTOP)
    stopped_at = time.monotonic()
    wait_until(lambda: not running(crew.pids[0]), "the end of the other one", crew.pids[1:])
    seconds = time.monotonic() - stopped_at
    _, status = os.waitpid(crew.pids[0], 0)
    os.kill(crew.pids[1], signal.SIGKILL)
    os.waitpid(crew.pids[1], 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "over": round(seconds - SHORT, 2),
        "line": last_line(root, "hung", 0),
    }


def not_finite(root, data):
    """On one process only: a loss that is not a number and makes all gradients so; an infinite loss; a norm."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        name = f"nan-{strategy}"

        def spoil(rank, name=name):
            losses, gradients, norm, step = loop.training_losses, loop._gradients, loop.whole, -1

            def spoiled_losses(*args, **kwargs):
                result = losses(*args, **kwargs)
                return result._replace(loss=result.loss * math.nan) if step == 1 and rank == 1 else result

            def spoiled_gradients(state, *args):
                nonlocal step
                step = state.step
                if step == 5:
                    tensors = {f"{k}.{n}": t for k, group in state._tensors().items() for n, t in group.items()}
                    digest = tensors_digest({key: whole(tensor) for key, tensor in tensors.items()})
                    (root / f"{name}-seen" / f"{rank}.sha256").write_text(digest)
                loss = gradients(state, *args)
                return math.inf if step == 2 and rank == 1 else loss

            def spoiled_norm(tensor):
                return norm(tensor) * (math.nan if step == 3 and rank == 1 else 1)

            loop.training_losses, loop._gradients, loop.whole = spoiled_losses, spoiled_gradients, spoiled_norm

        arguments = flags(root / name, data, *FAST, "--parallel.strategy", strategy)
        crew = Watched(root, name, 2, arguments, spoil)
        _, tensors = (crew.wait(PATIENCE), weights(root / name)[1])
        found[strategy] = {
            "skipped": [[line["step"] for line in crew.steps(rank) if line["skipped"]] for rank in (0, 1)],
            "kept": json.loads(next((root / name / "checkpoints").glob("*6/state.json")).read_text())["skipped"],
            "finite": all(tensor.isfinite().all().item() for tensor in tensors.values()),
            "weights": [(root / f"{name}-seen" / f"{rank}.sha256").read_text() for rank in (0, 1)],
        }
    return found


def out_of_memory(root, data):
    """Memory runs out on one process only, before the first step and within a later one."""
    found = {}
    plain = flags(root / "small", data, *FAST, "--micro-batch", "2", "--parallel.strategy", "ddp")
    Watched(root, "small", 2, plain).wait(PATIENCE)
    for name, strategy, call in (("early", "ddp", 0), ("late", "ddp", 3), ("late-fsdp", "fsdp", 2)):

        def fail(rank, call=call):
            real, calls = loop._run_micro_batch, itertools.count()

            def run(state, batch, *args, **kwargs):
                if next(calls) >= call and len(batch) > 2 and rank == 1:
                    raise torch.OutOfMemoryError("no room")
                return real(state, batch, *args, **kwargs)

            loop._run_micro_batch = run

        arguments = flags(root / name, data, *FAST, "--parallel.strategy", strategy)
        codes = [Watched(root, f"{name}1", 2, arguments, fail).wait(PATIENCE)]
        if codes[0] != [0, 0]:
            codes.append(Watched(root, f"{name}2", 2, arguments, fail).wait(PATIENCE))
        found[name] = {
            "codes": codes,
            "lines": [last_line(root, f"{name}1", rank) for rank in (0, 1)],
            "kept": json.loads((root / name / "micro_batch.json").read_text()),
            **difference(root / "small", root / name),
        }
    return found


def stopped(root, data):
    """SIGTERM to one or all of three processes: all save the same step, and the next start begins with the next."""
    base = (*FAST, "--steps", "24")
    Watched(root, "unstopped", 3, flags(root / "unstopped", data, *base)).wait(PATIENCE)
    arguments, codes, last, first, said = flags(root / "stopped", data, *base), [], [], [], []
    for k, targets in enumerate(((1,), (0, 1, 2), (2,))):
        crew = Watched(root, f"stopped{k}", 3, arguments, limit=5 * k + 5)
        crew.wait_for_step(5 * k + 2)
        for rank in targets:
            os.kill(crew.pids[rank], signal.SIGTERM)
        crew.go.touch()
        codes += crew.wait(PATIENCE)
        steps = [[line["step"] for line in crew.steps(rank)] for rank in range(3)]
        last.append([s[-1] for s in steps])
        first.append(steps[0][0])
        said.append([text(root, f"stopped{k}", rank).count("the same command continues") for rank in range(3)])
    end = Watched(root, "stopped-end", 3, arguments)
    codes += end.wait(PATIENCE)
    first.append(end.steps()[0]["step"])
    return {
        "codes": codes,
        "together": all(len(set(steps)) == 1 for steps in last),
        "follows": first[1:] == [steps[0] + 1 for steps in last],
        "said": said,
        "same": whole_state(root / "stopped") == whole_state(root / "unstopped"),
    }


if __name__ == "__main__":
    begin("smalti.cli.train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor")
    root, part, KILLS = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    what, _, how = part.partition(" ")
    print(json.dumps({part: globals()[what](root, write_set(root / "data"), *how.split())}), flush=True)
