"""What the processes of one training run do as one: hold its folder, agree on what it is, write, and make room."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.checkpoints import RunLock
from smalti.checkpoints.together import Together
from smalti.data.image_set import Catalogue
from smalti.errors import DataError, PreemptedError, SmaltiError
from smalti.models import BackboneConfig, build_backbone
from smalti.report.files import write_text
from smalti.training.config import RunConfig
from smalti.training.distributed import as_sharded, whole
from smalti.training.log import RunLog
from smalti.training.loop import MicroBatchTooLargeError, StepReport
from smalti.training.status import mark_finished, mark_preempted, mark_refused, mark_running, marked_failures
from smalti.training.stop import outlasts_the_grace
from smalti.workflows.progress import ProgressReport
from smalti.workflows.run_folder import check_config, run_id, write_config
from smalti.world import World

MICRO_BATCH = "micro_batch.json"


@contextmanager
def locked(folder: Path, me: World, *, steal: bool = False) -> Iterator[None]:
    """The first process holds the run folder for all; if it cannot, all hear why. `steal` is as of `RunLock`."""
    with ExitStack() as held:

        def take(_: object) -> None:
            held.enter_context(RunLock(folder, steal=steal))

        Together(me).step(lambda: None, take)
        yield


@contextmanager
def refusals_marked(folder: Path) -> Iterator[None]:
    """Leave word of errors that come before the run holds its folder, on whichever process."""
    since = time.time()
    try:
        yield
    except SmaltiError as error:
        mark_refused(folder, error, since=since)
        raise


@dataclass
class Part:
    """What this start has in the run whose folder it holds.

    Until it has begun, it may be refused for what it asks or finds, and then leaves a finished run as it was.
    """

    config: RunConfig
    catalogue: Catalogue
    model: BackboneConfig
    me: World
    begun: bool = False

    def begin(self) -> None:
        """From here on the run is this one's: the word of the last start goes, and its settings are replaced."""
        if self.begun:
            return

        def begin(_: object) -> None:
            mark_running(self.config.out)
            write_config(self.config, self.catalogue, self.model)

        Together(self.me).step(lambda: None, begin)
        self.begun = True


@contextmanager
def marked(part: Part, step: Callable[[], int]) -> Iterator[None]:
    """Leave word in the run folder of how the body ended; see `smalti.training.status`.

    Args:
        step: how far the run is.
    """
    folder, me = part.config.out, part.me
    if me.rank == 0:
        mark_running(folder, begun=False)
    with marked_failures(folder, lambda: part.begun):
        try:
            yield
        except PreemptedError as error:
            if me.rank == 0:
                mark_preempted(folder, step(), error.signal_name)
            raise
        if me.rank == 0:
            mark_finished(folder, step())


def known_run(folder: Path, me: World) -> str | None:
    """`run_id`, as the first process reads it."""
    found: str | None = me.broadcast_object(run_id(folder) if me.rank == 0 else None)
    return found


def warn_of_slow_saves(seconds: float, log: "RunLog | _NoLog", step: int, progress: ProgressReport) -> None:
    """Say so if a stop could come too late for its checkpoint."""
    if warning := outlasts_the_grace(seconds):
        log.write("slow_save", step, seconds=round(seconds, 1))
        progress.note(warning)


def changes_of(part: Part) -> list[str]:
    """`check_config` by the first process, for all; they must train on the same examples."""
    config, catalogue = part.config, part.catalogue

    def agreed(fingerprints: list[str]) -> list[str]:
        if others := [rank for rank, found in enumerate(fingerprints) if found != fingerprints[0]]:
            raise DataError(
                f"process {others[0]} finds other examples in {config.data.path} than process 0: every machine of "
                "the run needs the same"
            )
        return check_config(config, catalogue)

    changed: list[str] = Together(part.me).step(lambda: catalogue.fingerprint, agreed)
    return changed


def open_log(folder: Path, step: int, me: World, *, tensorboard: bool) -> "RunLog | _NoLog":
    """Without a checkpoint nothing of an earlier try counts, not even its step 0."""
    return RunLog(folder, step, tensorboard=tensorboard) if me.rank == 0 else _NoLog()


class _NoLog:
    """Of the processes that do not write."""

    def write(self, event: str, step: int, **values: Any) -> None:
        pass

    def close(self) -> None:
        pass


def allowed_micro_batch(config: RunConfig, me: World) -> int | None:
    """As asked for, or less where that was found to be too much for the memory."""
    path, found = config.out / MICRO_BATCH, None
    if me.rank == 0 and path.exists():
        # Only a hint: where it is damaged, memory is tried out again.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text())
            found = int(kept["micro_batch"]) if kept["asked"] == config.micro_batch else None
    found = me.broadcast_object(found)
    return config.micro_batch if found is None else max(1, int(found))


def told_of_memory(steps: Iterator[StepReport], config: RunConfig, me: World) -> Iterator[StepReport]:
    """The steps; a micro-batch that had to be made smaller is written down, so that the next start begins with it."""
    known: int | None = None
    try:
        for report in steps:
            asked = min(config.micro_batch or config.batch_size, -(-config.batch_size // me.size))
            if report.micro_batch < (asked if known is None else known) and me.rank == 0:
                _keep_micro_batch(config, report.micro_batch)
            known = report.micro_batch
            yield report
    except MicroBatchTooLargeError as error:
        _keep_micro_batch(config, error.micro_batch)
        raise


def _keep_micro_batch(config: RunConfig, micro_batch: int) -> None:
    document = {"asked": config.micro_batch, "micro_batch": micro_batch}
    write_text(config.out / MICRO_BATCH, json.dumps(document) + "\n")


def whole_network(network: nn.Module, model: BackboneConfig, me: World) -> nn.Module:
    """A network in parts as a plain one on the CPU of the first process; others keep their part."""
    tensors = network.state_dict()
    if not any(as_sharded(tensor) is not None for tensor in tensors.values()):
        return network
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)  # one at a time, because every process gets it
        if me.rank == 0:
            found[name] = gathered.cpu().clone()
    if me.rank:
        return network
    with torch.device("meta"):
        plain = build_backbone(model)
    plain.load_state_dict(found, strict=True, assign=True)
    return plain.eval().requires_grad_(False)
