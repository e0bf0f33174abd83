"""A plan as text for people."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from smalti.cost.plan_devices import GIB
from smalti.cost.plan_request import PlanRequest

if TYPE_CHECKING:
    from smalti.cost.plan import Plan


def plan_lines(plan: "Plan") -> list[str]:
    """Network, operations, memory, disk, communication, time, samples; then what the words mean."""
    blocks = [
        list(_network(plan)),
        list(_memory(plan)),
        list(_communication(plan)),
        list(_time(plan)),
        list(_checkpoints(plan)),
        list(_samples(plan)),
        list(_notes(plan)),
    ]
    lines: list[str] = []
    for block in blocks:
        if block:
            lines += ([""] if lines else []) + block
    return lines


def _network(plan: "Plan") -> Iterator[str]:
    r, d, o = plan.request, plan.device, plan.operations
    size = "x".join(map(str, r.network.sample_size))
    name = r.name or r.network.kind
    yield f"{name}, latents {r.network.in_channels}x{size}, {r.steps:,} steps of {r.batch_size:,} images, {r.precision}"
    yield f"{_world(r)}; {r.local_batch:,} images each, {_batches(r)}{_policy(r)}"
    rows = [
        ("parameters", f"{plan.parameters.total:,}", f"{plan.parameters.trained:,} trained"),
        ("forward, an image", f"{plan.macs.total / 1e9:,.3f} GMACs", f"{_flops(o.forward)}"),
        ("training, an image", _flops(o.train), f"{_flops(o.again)} of it computed again" if o.again else ""),
        ("operations, a step", _flops(o.step), f"{_flops(o.run)} in all"),
        ("peak of a device", f"{d.peak(r.precision) / 1e12:,.4g} TFLOP/s", d.source),
    ]
    yield from _table(rows)


def _world(r: PlanRequest) -> str:
    split = {
        "single": "one process",
        "ddp": "a copy on each",
        "fsdp": f"one copy split over {r.shards:,}",
        "hsdp": f"{r.ranks // r.shards:,} copies, each split over {r.shards:,}",
    }[r.strategy]
    nodes = f"{r.nodes:,} node{'s' if r.nodes > 1 else ''} x {r.gpus_per_node} {r.device}"
    return f"{nodes}, {r.strategy}: {split}"


def _batches(r: PlanRequest) -> str:
    return "at once" if r.micro_batches == 1 else f"{r.images_at_once:,} at once, {r.micro_batches} times a step"


def _policy(r: PlanRequest) -> str:
    return "" if r.activation_checkpointing == "none" else f", activation checkpointing {r.activation_checkpointing}"


def _memory(plan: "Plan") -> Iterator[str]:
    most, least, r = plan.state.most, plan.state.least, plan.request
    rows = [(word, getattr(most, name), getattr(least, name)) for name, word in _WORDS.items() if getattr(most, name)]
    activations = plan.memory.peak if r.shards == 1 else plan.memory.peak_without_copies
    rows.append(("activations", activations, activations))
    cells = [[word, _gib(one), *([] if most == least else [_gib(other)])] for word, one, other in rows]
    head = ["memory of a process", "GiB"] if most == least else ["memory of a process", "most GiB", "least GiB"]
    yield from _table([head, *cells], right=True)
    fit = plan.fit
    yield (
        f"  worst moment {_gib(fit.peak)} of {_gib(fit.memory)} GiB ({fit.peak / fit.memory:.0%}). "
        f"Fits: {fit.verdict}; largest micro-batch that fits: {fit.largest_micro_batch or 'none'}"
        + (" (all of a process's share)" if fit.largest_micro_batch == r.local_batch else "")
    )
    for advice in fit.advice:
        yield f"  would fit: {advice}"


_WORDS = {
    "weights": "weights",
    "moments": "Adam's moments",
    "average": "average (EMA)",
    "gradients": "gradients",
    "gathered": "gathered weights",
    "reduced": "gradients of a block",
    "optimizer": "room for the update",
}


def _communication(plan: "Plan") -> Iterator[str]:
    c = plan.communication
    if plan.request.ranks > 1:
        yield (
            f"communication, a step and device: {c.inside / 1e9:,.3f} GB inside the node"
            + (f", {c.between / 1e9:,.3f} GB to other nodes" if c.between else "")
            + f"; {_seconds(c.seconds)} at the rates of the links"
        )


def _time(plan: "Plan") -> Iterator[str]:
    yield f"time of the run, utilisation {plan.calibration}"
    priced = plan.request.price_per_hour is not None
    rows = [["of the peak", "a step", "images/s", "run", "device hours", *(["cost"] if priced else []), "slowest"]]
    for p in plan.paces:
        cost = [] if p.cost is None else [_money(p.cost)]
        hours = f"{p.device_hours:,.4g}"
        speed = f"{p.images_per_second:,.{0 if p.images_per_second >= 1000 else 2}f}"
        rows.append([f"{p.utilisation:.1%}", _seconds(p.step_seconds), speed, _hours(p.hours), hours, *cost, p.bound])
    yield from _table(rows, right=True)


def _checkpoints(plan: "Plan") -> Iterator[str]:
    s = plan.stored
    groups = ", ".join(f"{name} {size / 1e9:,.3f}" for name, size in s.by_group.items())
    yield f"checkpoint {s.bytes / 1e9:,.3f} GB ({groups}), {_seconds(s.write_seconds)} to write"
    for what, i in (("waiting for the disk", s.waiting), ("in the background", s.background)):
        yield (
            f"  {what}: save every {_seconds(i.seconds)}, which costs {i.overhead:.2%} of the run "
            f"(stands still {_seconds(i.save_seconds)}, a failure every {_hours(i.mtbf_hours)})"
        )


def _samples(plan: "Plan") -> Iterator[str]:
    r = plan.request
    guided = f"guidance {r.guidance_scale:g}" if r.guidance_scale != 1 else "no guidance"
    hours = " / ".join(f"{s.device_hours:,.4g}" for s in plan.sampling)
    cost = (
        ""
        if r.price_per_hour is None
        else ", cost " + " / ".join(_money(s.cost) for s in plan.sampling if s.cost is not None)
    )
    shares = " / ".join(f"{s.utilisation:.1%}" for s in plan.sampling)
    yield f"{r.sample_images:,} samples, {r.sample_steps} steps, {guided}: {hours} device hours at {shares}{cost}"


def _notes(plan: "Plan") -> Iterator[str]:
    yield from plan.notes
    if plan.calibration == "assumed":
        yield "Utilisation is assumed: --measured RUN takes it from one real step."
    yield "Operations: two for each multiply-add of products, convolutions, attention, scans and transforms. Memory:"
    yield "tensors alone; a device needs some more for its context and libraries. Rates of links and disks are stated"
    yield "ones. Decoding latents and reading data are left out."


def _table(rows: Sequence[Sequence[str]], *, right: bool = False) -> Iterator[str]:
    """Columns under each other; numbers to the right, where a row's first cell is its name."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _money(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def _gib(count: int) -> str:
    return f"{count / GIB:,.3f}"


def _flops(count: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:,.4g} {unit}"
    return f"{count / 1e6:,.4g} MFLOP"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1e3:,.3g} ms"
    return f"{value:,.3g} s" if value < 120 else f"{value / 60:,.3g} min" if value < 7200 else _hours(value / 3600)


def _hours(value: float) -> str:
    if value < 2:
        return _seconds(value * 3600)
    if value < 72:
        return f"{value:,.3g} h"
    return f"{value / 24:,.1f} days" if value < 24_000 else f"{value / 8766:,.1f} years"
