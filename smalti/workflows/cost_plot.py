"""The picture of `cost`: every network beside the first, or every mixer beside attention, over the size of latents."""

from collections.abc import Callable, Iterator
from pathlib import Path

from smalti.errors import ConfigError
from smalti.report.panels import COLOURS, Curve, Panel, draw
from smalti.workflows.cost_crossovers import BASELINE
from smalti.workflows.cost_report import CostReport, CostRow, macs_of, seconds_of

_WHAT = {"mixer": "the mixer alone", "network": "the whole network"}


def check_plot(path: Path, sizes: str) -> None:
    """Refuse what could not be drawn, before anything is counted.

    Raises:
        ConfigError: not .svg or .png, or fewer than two sizes.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"plot {str(path)!r}: write to a name that ends with .svg or .png")
    if len(set(sizes.split(","))) < 2:
        raise ConfigError("a plot shows cost against size: give at least two, e.g. --sizes 32,64,128,256,512")


def write_plot(report: CostReport, path: Path) -> None:
    """Costs as multiples of the first network's, or of the same network with attention where mixers are exchanged.

    Raises:
        StorageError: the disk is full or refuses.
    """
    panels = list(_panels(report))
    draw(panels, columns=min(2, len(panels))).write(path)


def _panels(report: CostReport) -> Iterator[Panel]:
    exchanged = len({row.mixer for row in report.rows if row.network == report.rows[0].network}) > 1
    networks = dict.fromkeys(row.network for row in report.rows)
    groups = [[r for r in report.rows if r.network == n] for n in networks] if exchanged else [list(report.rows)]
    for rows in groups:
        for unit, value in (("multiply-adds", macs_of), ("seconds", seconds_of)):
            for what in ("mixer", "network") if exchanged else ("network",):
                if panel := _panel(report, rows, what, unit, value, exchanged):
                    yield panel


def _panel(
    report: CostReport,
    rows: list[CostRow],
    what: str,
    unit: str,
    value: Callable[[CostRow, str], float | None],
    exchanged: bool,
) -> Panel | None:
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        found = value(row, what)
        if found:
            series.setdefault(row.mixer if exchanged else row.network, {})[row.sample_size[0]] = found
    if not series:
        return None
    reference = BASELINE if BASELINE in series else next(iter(series))
    base = series[reference]
    curves = []
    for name, colour in zip(series, _colours(list(series), reference), strict=True):
        points = [(float(side), cost / base[side]) for side, cost in series[name].items() if side in base]
        found_at = [
            _where(rows, c.tokens)
            for c in report.crossovers
            if (c.network, c.mixer, c.what, c.unit) == (rows[0].network, name, what, unit) and c.tokens is not None
        ]
        rings = [(side, 1.0) for side in found_at if side > rows[0].sample_size[0]]
        if points:
            label = name + _since(report, rows[0].network, name, what, unit) if exchanged else name
            curves.append(Curve(label, points, colour, dashed=name == reference, rings=rings))
    if max(len(curve.points) for curve in curves) < 2:
        return None
    title = f"{rows[0].network}, {_WHAT[what]}" if exchanged else _WHAT[what]
    label = f"{unit} of a forward, as a multiple of {'that with ' if exchanged else ''}{reference}"
    x_label = "side of the latents"
    if exchanged:
        x_label += f", tokens; from n: cheaper than {reference} from n tokens on"
    return Panel(title, curves, x_label, label, _ticks(rows, exchanged))


def _since(report: CostReport, network: str, mixer: str, what: str, unit: str) -> str:
    wanted = (network, mixer, what, unit)
    for c in report.crossovers:
        if (c.network, c.mixer, c.what, c.unit) == wanted:
            return ", never" if c.tokens is None else f", from {c.tokens:,}"
    return ""


def _where(rows: list[CostRow], tokens: int) -> float:
    """The side of latents with so many tokens, which grow with its square."""
    return rows[0].sample_size[0] * (tokens / rows[0].tokens) ** 0.5


def _ticks(rows: list[CostRow], exchanged: bool) -> list[tuple[float, str, str]]:
    tokens = {row.sample_size[0]: row.tokens for row in rows}
    return [(float(side), str(side), f"{n:,}" if exchanged else "") for side, n in sorted(tokens.items())]


def _colours(names: list[str], reference: str) -> list[str]:
    others = [name for name in names if name != reference]
    return [COLOURS[0] if name == reference else COLOURS[1 + others.index(name) % 7] for name in names]
