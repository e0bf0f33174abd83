"""`train --dry-run`: everything that could stop a run, tried before it: settings, data, memory, folder, two real steps.

What it writes lies in a folder of its own beside the run folder, and is gone at the end.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from smalti import streams
from smalti.checkpoints import CheckpointStore, RunLock
from smalti.checkpoints.layout import name_of
from smalti.checkpoints.together import Together
from smalti.cost.plan_devices import GIB, find_device, machine_memory
from smalti.cost.plan_fit import Fit, find_fit
from smalti.cost.plan_request import PlanRequest
from smalti.cost.plan_state import checkpoint_bytes
from smalti.cost.trial import on_meta
from smalti.errors import CheckpointError, ConfigError, DataError, NumericError
from smalti.models import BackboneConfig
from smalti.storage.filesystem import LocalFileSystem, require_space
from smalti.training.config import RunConfig
from smalti.training.device import resolve_device
from smalti.training.distributed import apply_activation_checkpointing, local_part
from smalti.training.loop import train_steps
from smalti.training.peers import Peers
from smalti.training.state import TrainState
from smalti.training.status import read_status
from smalti.training.stop import outlasts_the_grace
from smalti.workflows.run_folder import check_config, check_run_folder
from smalti.workflows.train_setup import Run, new_state, prepare_run
from smalti.world import World, world

STEPS = 2
PLACES = 8  # examples that are read, from all over the set


@dataclass(frozen=True)
class DryRun:
    """What two steps came to.

    Args:
        losses, grad_norms: of each step, as the run itself would have them at its beginning.
        step_seconds: of the second one; the first also warms caches up.
        save_seconds: of a checkpoint, from its begin to the last byte on the disk.
        micro_batch: images of one forward pass of one process.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    step_seconds: float
    save_seconds: float
    micro_batch: int


def dry_run(config: RunConfig, say: Callable[[str], None], *, steal: bool = False) -> DryRun:
    """Try what `train` would do, and leave the run folder as it is.

    Of several processes, each calls this; the first one speaks.

    Args:
        say: told one line after the other.
        steal: as of `train`.

    Raises:
        ConfigError: settings, data or run folder do not go together, or the network does not fit the memory here; then
            everything else has been looked at before, and nothing was trained.
        DataError: examples that cannot be read. StorageError: no room for checkpoints. RunLockedError: the run is under
            way. NumericError: a loss or gradient that is not finite. CheckpointError: what was stored is not what was
            saved.
    """
    check_run_folder(config)
    device = resolve_device(config.device)
    patience = timedelta(minutes=config.parallel.timeout_minutes)
    with world(device, patience) as me, Peers(me) as peers, peers.watched():
        tell = say if me.rank == 0 else _silent
        run, model = prepare_run(config, me)
        _look_at_data(run, tell)
        network = on_meta(model)
        fit, asked = _memory(run, model, network)
        _tell_memory(run, fit, asked, tell)

        def look_at_folder(_: object) -> None:
            _look_at_folder(run, network, tell, steal=steal)

        Together(me).step(lambda: None, look_at_folder)
        micro_batch = _settle_micro_batch(run, fit, asked)
        with _folder_beside(config.out, me) as folder:
            return _trial(run, model, folder, micro_batch, tell)


def _silent(line: str) -> None:
    """Of the processes that do not speak."""


def _look_at_data(run: Run, tell: Callable[[str], None]) -> None:
    catalogue, (channels, rows, columns) = run.catalogue, run.examples.sample_shape
    classes = f"of {len(catalogue.class_names):,} classes" if catalogue.class_names else "without classes"
    parts = f"{len(run.split.train):,} to train on, {len(run.split.validation):,} held out"
    tell(
        f"data: {catalogue.name}, {len(catalogue):,} examples {classes}, {channels} x {rows} x {columns} "
        f"({run.examples.codec.label}), fingerprint {catalogue.fingerprint[:12]}; {parts}"
    )
    places = [streams.key(run.config.seed, streams.ORDER, k) % (8 * len(run.split.train)) for k in range(PLACES)]
    begin = time.perf_counter()
    batch = run.examples.load(run.batches.order, places, flip=run.config.data.flip, seed=run.config.seed)
    seconds = (time.perf_counter() - begin) / PLACES
    if not bool(batch.x0.isfinite().all()):
        raise DataError(f"{run.config.data.path} holds values that are not finite; look at it with `smalti data check`")
    low, high, mean, spread = (float(value) for value in (*batch.x0.aminmax(), batch.x0.mean(), batch.x0.std()))
    tell(
        f"read {PLACES} examples from all over it, {1e3 * seconds:.1f} ms each; values from {low:.2f} to {high:.2f}, "
        f"mean {mean:.2f}, spread {spread:.2f}"
    )


def _memory(run: Run, model: BackboneConfig, network: nn.Module) -> tuple[Fit, PlanRequest]:
    """Whether one step fits what is free here now, by the same account as `smalti plan`."""
    config, me = run.config, run.world
    request = PlanRequest(
        network=model,
        name=config.model,
        batch_size=max(config.batch_size, me.size),
        micro_batch=None if config.micro_batch is None else min(config.micro_batch, -(-config.batch_size // me.size)),
        precision=config.precision,
        nodes=-(-me.size // _neighbours(me)),
        gpus_per_node=_neighbours(me),
        strategy=run.parallel.strategy,
        shard_size=config.parallel.shard_size if run.parallel.strategy == "hsdp" else None,
        reshard=config.parallel.reshard,
        activation_checkpointing=config.parallel.activation_checkpointing,
        steps=config.steps,
    )
    kind = find_device("h100" if run.device.type == "cuda" else "cpu")
    _, fit = find_fit(request, replace(kind, memory=_free_memory(run)), network, apply_activation_checkpointing)
    return fit, request


def _free_memory(run: Run) -> int:
    """Bytes that this process may take; on a CPU, the processes of a machine share what is free."""
    if run.device.type == "cuda":
        return torch.cuda.mem_get_info(run.device)[0]
    free = machine_memory()
    with contextlib.suppress(FileNotFoundError):  # Linux knows better
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(FileNotFoundError, ValueError):  # a container may have less; "max" is no number
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free // _neighbours(run.world)


def _neighbours(me: World) -> int:
    """Processes of this machine, as `torchrun` says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", me.size))


def _tell_memory(run: Run, fit: Fit, asked: PlanRequest, tell: Callable[[str], None]) -> None:
    network = sum(parameter.numel() for parameter in on_meta(asked.network).parameters())
    images = f"{asked.images_at_once} image{'s' if asked.images_at_once > 1 else ''} at once"
    fits = {"yes": "fits", "tight": "is tight", "no": "does not fit here"}[fit.verdict]
    tell(
        f"memory: {asked.name}, {network:,} parameters, {images} of {asked.batch_size} in {asked.precision}: a step "
        f"needs {_size(fit.peak)} of {_size(fit.memory)} free on {run.device}, which {fits}; "
        f"largest micro-batch that fits: {fit.largest_micro_batch}"
    )
    for advice in fit.advice:
        tell(f"  would fit: {advice}")


def _settle_micro_batch(run: Run, fit: Fit, asked: PlanRequest) -> int:
    """What to try; a GPU that runs out of memory tries half of it, a machine that does so is lost."""
    if fit.verdict != "no":
        return asked.images_at_once
    if not fit.largest_micro_batch or run.device.type != "cuda":
        advice = fit.advice[0] if fit.advice else "choose a smaller network, or more and larger devices"
        raise ConfigError(
            f"{asked.name} does not fit here: a step needs {_size(fit.peak)}, {_size(fit.memory)} are free on "
            f"{run.device}; nothing was trained. Try {advice}"
        )
    return fit.largest_micro_batch


def _look_at_folder(run: Run, network: nn.Module, tell: Callable[[str], None], *, steal: bool) -> None:
    """What is there, whether it may be continued, and whether checkpoints have room; the first process looks."""
    config = run.config
    if config.out.exists() and not config.out.is_dir():
        raise ConfigError(f"{config.out} is a file; choose another --out")
    changed = check_config(config, run.catalogue)
    if config.out.is_dir():
        _try_lock(config.out, steal=steal)
    steps = sorted(
        int(path.name[5:]) for path in (config.out / "checkpoints").glob("step-*") if path.name[5:].isdigit()
    )
    status = read_status(config.out)
    if steps:
        ended = "" if status.kind == "open" else f", {status.kind}"
        rest = "nothing is left to do" if steps[-1] >= config.steps else f"the run would continue at step {steps[-1]:,}"
        tell(f"run folder: {config.out} holds {name_of(steps[-1])}{ended}: {rest}")
    else:
        tell(f"run folder: {config.out} {'holds no checkpoint' if config.out.is_dir() else 'is new'}: step 0")
    if status.kind == "failed":
        tell(f"  the last start failed: {status.values.get('message', 'without a message')}")
    for change in changed:
        tell(f"  other than at the last start: {change}")
    one = sum(checkpoint_bytes(network).values())
    kept = config.keep_checkpoints + (config.steps // config.store.keep_every if config.store.keep_every else 0)
    place, fs = _standing(config.out), LocalFileSystem()
    require_space(fs, place, (config.keep_checkpoints + 1) * one, f"{config.keep_checkpoints + 1} checkpoints")
    tell(
        f"disk: {fs.free_bytes(place) / 1e9:.1f} GB free; a checkpoint takes {one / 1e9:.3f} GB, and at the end "
        f"{kept} of them stay, {kept * one / 1e9:.1f} GB"
    )
    if fs.free_bytes(place) < 1.2 * kept * one:
        tell(f"  more than is free: store.keep_every {config.store.keep_every} fills the disk before the end")


def _try_lock(folder: Path, *, steal: bool) -> None:
    """Whether another process writes there, without leaving a mark of the question."""
    path = folder / ".lock"
    before = path.read_bytes() if path.exists() else None
    with RunLock(folder, steal=steal):
        pass
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)


def _standing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


@contextlib.contextmanager
def _folder_beside(out: Path, me: World) -> Iterator[Path]:
    """A folder on the disk of the run that goes when it was used; all processes see the same."""

    def make(_: object) -> str:
        return tempfile.mkdtemp(prefix=".dry-run-", dir=_standing(out.absolute().parent))

    folder = Path(Together(me).step(lambda: None, make))
    try:
        yield folder
    finally:
        if me.rank == 0:
            shutil.rmtree(folder)


def _trial(run: Run, model: BackboneConfig, folder: Path, micro_batch: int, tell: Callable[[str], None]) -> DryRun:
    """Two steps, a checkpoint and back."""
    config = replace(run.config, out=folder, micro_batch=micro_batch)
    run = replace(run, config=config)
    state = new_state(run, model)
    begin, reports, seconds = time.perf_counter(), [], []
    for report in itertools.islice(train_steps(state, run.batches, config), STEPS):
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        seconds.append(time.perf_counter() - begin)
        reports.append(report)
        tell(
            f"step {report.step}: loss {report.loss:.4f}, gradient norm {report.grad_norm:.4f}, {seconds[-1]:.2f} s"
            + (f", {report.micro_batch} images at once" if report.micro_batch != micro_batch else "")
        )
        if report.skipped:
            raise NumericError(f"step {report.step} has a loss or gradient that is not finite, and so would the run")
        begin = time.perf_counter()
    saved = _save_and_load(run, state, folder)
    tell(f"checkpoint: saved in {saved:.2f} s, read back bit for bit")
    if advice := outlasts_the_grace(saved):
        tell(f"  {advice}")
    rate, whole = config.batch_size / seconds[-1], _duration(config.steps * seconds[-1])
    tell(
        f"time: {seconds[-1]:.3f} s a step, {rate:.1f} images/s: {config.steps:,} steps take {whole}, without "
        "validation, samples and checkpoints"
    )
    return DryRun(
        tuple(report.loss for report in reports),
        tuple(report.grad_norm for report in reports),
        seconds[-1],
        saved,
        reports[-1].micro_batch,
    )


def _save_and_load(run: Run, state: TrainState, folder: Path) -> float:
    """Seconds of a save.

    Raises:
        CheckpointError: what is read is not what was written.
    """
    before = _digest(state)
    store = CheckpointStore(folder / "checkpoints", sole_writer=True, world=run.world)
    begin = time.perf_counter()
    store.save(state.step, state.groups(), state.counters())
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.zero_()
    stored = store.load_newest(on_skip=lambda reason: None)
    if stored is None:
        raise CheckpointError(f"the checkpoint just written to {folder} cannot be read; look at the disk")

    def read() -> None:
        state.restore(stored)
        if _digest(state) != before:
            raise CheckpointError(f"a checkpoint read from {folder} is not what was written; look at the disk")

    # Together: the first process takes the folder away, and each reads its own part at its own pace.
    Together(run.world).step(read, lambda answers: None)
    return seconds


def _digest(state: TrainState) -> str:
    """Of this process's part of network, average and moments."""
    found = hashlib.sha256()
    moments = (value for values in state.optimizer.state.values() for value in values.values())
    for tensor in (*state.model.state_dict().values(), *state.ema.model.state_dict().values(), *moments):
        found.update(_bytes(local_part(tensor)))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
