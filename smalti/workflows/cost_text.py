"""The report of `cost` as tables for people."""

from collections.abc import Iterator, Sequence

from smalti.cost.macs import PUBLISHED_KINDS
from smalti.workflows.cost_report import CostReport, CostRow, Crossover
from smalti.workflows.timed import WorkTime

ON_TOP = ("scan", "fft", "kernel")
_WORK = ("forward", "training")


def as_table(report: CostReport) -> str:
    """Counts by kind, by part, what was measured, crossovers; then what the columns mean."""
    blocks = [_counts(report.rows), _parts(report.rows)]
    if report.measuring is not None:
        blocks += [_measured(report)] if any(row.measured for row in report.rows) else []
        blocks += ["\n".join(left_out)] if (left_out := list(_left_out(report.rows))) else []
    if report.crossovers:
        blocks.append("\n".join(["cheaper than attention in the same network:", *map(say, report.crossovers)]))
    return "\n\n".join([*blocks, "\n".join(_notes(report))])


def say(crossover: Crossover) -> str:
    """A crossover in one line."""
    where = f"at none of {crossover.smallest:,} to {crossover.largest:,} tokens"
    if crossover.tokens is not None:
        about = "" if crossover.exact or crossover.tokens == crossover.smallest else "about "
        least = ", the fewest looked at" if crossover.tokens == crossover.smallest else ""
        where = f"from {about}{crossover.tokens:,} tokens on{least}"
    what = "the mixer alone" if crossover.what == "mixer" else "the network"
    return f"  {crossover.network} with {crossover.mixer}, {what}, in {crossover.unit}: {where}"


def _counts(rows: Sequence[CostRow]) -> str:
    kinds = [kind for kind in (*PUBLISHED_KINDS, *ON_TOP) if any(kind in row.macs.by_kind for row in rows)]
    kinds += sorted({kind for row in rows for kind in row.macs.by_kind} - set(kinds))
    header = ["network", "mixer", "latents", "tokens", "trained", "fused", "GMACs", "published", *kinds]
    lines = [
        [
            *_name(row),
            f"{row.tokens:,}",
            f"{row.parameters.trained:,}",
            f"{row.parameters.fused:,}" if row.parameters.fused != row.parameters.trained else "",
            _giga(row.macs.total),
            _giga(row.macs.published),
            *(_giga(row.macs.by_kind.get(kind, 0)) for kind in kinds),
        ]
        for row in rows
    ]
    return _columns(header, lines)


def _parts(rows: Sequence[CostRow]) -> str:
    parts = list(dict.fromkeys(part for row in rows for part in row.macs.by_part))
    header = ["GMACs by part:", "mixer", "latents", *parts, "forward MiB", "training MiB"]
    lines = [
        [
            *_name(row),
            *(_giga(row.macs.by_part.get(part, 0)) for part in parts),
            _mib(row.activations.forward),
            _mib(row.activations.training),
        ]
        for row in rows
    ]
    return _columns(header, lines)


def _measured(report: CostReport) -> str:
    header = ["measured:", "mixer", "latents", "one mixer ms"]
    for work in _WORK:
        header += [f"{work} ms", "x floor", "x fp32 floor", "peak MiB"]
    lines = []
    for row in report.rows:
        if row.measured:
            cells = [*_name(row), "-" if row.mixer_seconds is None else f"{row.mixer_seconds * 1e3:,.2f}"]
            for work in _WORK:
                cells += _times(row.measured.get(work))
            lines.append(cells)
    return _columns(header, lines)


def _times(time: WorkTime | None) -> list[str]:
    if time is None:
        return ["-"] * 4
    peak = "-" if time.peak_added_bytes is None else _mib(time.peak_added_bytes)
    return [f"{time.seconds * 1e3:,.1f}", f"{time.floors:.2f}", f"{time.fp32_floors:.2f}", peak]


def _left_out(rows: Sequence[CostRow]) -> Iterator[str]:
    for row in rows:
        for reason in row.left_out:
            yield f"not measured: {row.network} with {row.mixer}, {_size(row)}, {reason}"


def _notes(report: CostReport) -> Iterator[str]:
    yield "Counts are of one image in the inference form. trained: parameters; fused: those of the inference form,"
    yield "where it is another. published: linear + conv + attention, as papers count; GMACs has the rest on top. One"
    yield "multiply-add is two flops. MiB: float32 activations, alive at once in a forward; kept by a training step."
    if (m := report.measuring) is not None:
        yield f"Measured: batch {m.batch}, {m.precision}, {m.device}, {m.threads} threads, {report.clock}, median of"
        yield f"{m.repeats}, in the inference form for a forward, by the loop of `smalti train` for a training step."
        yield "floor: the multiply-adds at the rate of a large matrix product of the same precision, timed in turns; a"
        yield "training step counts three forwards. peak: what the whole batch adds to the memory held."


def _name(row: CostRow) -> list[str]:
    return [row.network, row.mixer, _size(row)]


def _size(row: CostRow) -> str:
    return "x".join(map(str, row.sample_size))


def _giga(macs: int) -> str:
    """Three decimals, or as many as a small number needs to show anything."""
    if macs == 0:
        return "0"
    return f"{macs / 1e9:,.3f}" if macs >= 1e6 else f"{macs / 1e9:.1e}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    names = 3  # network, mixer and size stand left, numbers right
    text = [
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text)
