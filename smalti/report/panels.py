"""Panels of curves over sizes that double, both axes logarithmic, each curve named at its end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from smalti.report.drawing import Dot, Drawing, Line, Words

WIDTH, HEIGHT = 540, 320  # of one panel
LEFT, RIGHT, TOP, BOTTOM = 58, 198, 44, 56
LINE_HEIGHT = 14
SOFT, RULE, INK = "#6b7280", "#e5e7eb", "#111827"
COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#b91c1c")


@dataclass(frozen=True)
class Curve:
    """Positive points in the order of x.

    Args:
        dashed: for what the others are compared with.
        rings: points worth a look.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    rings: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        ticks: (x, first line, second line or "").
    """

    title: str
    curves: Sequence[Curve]
    x_label: str
    y_label: str
    ticks: Sequence[tuple[float, str, str]]


def draw(panels: Sequence[Panel], columns: int) -> Drawing:
    """Panels in rows of `columns`.

    Raises:
        ValueError: a panel without curves, or a value that is not above 0.
    """
    shapes: list[Line | Dot | Words] = []
    for i, panel in enumerate(panels):
        shapes += _panel(panel, i % columns * WIDTH, i // columns * HEIGHT)
    rows = math.ceil(len(panels) / columns)
    return Drawing(WIDTH * min(columns, len(panels)), HEIGHT * rows, shapes)


def _panel(panel: Panel, x0: float, y0: float) -> list[Line | Dot | Words]:
    xs = [x for curve in panel.curves for x, _ in curve.points] + [x for x, _, _ in panel.ticks]
    ys = [y for curve in panel.curves for _, y in curve.points]
    if not ys or min(*xs, *ys) <= 0 or not all(map(math.isfinite, [*xs, *ys])):
        raise ValueError(f"panel {panel.title!r} needs curves with finite values above 0")
    left, right = math.log(min(xs)), math.log(max(xs))
    low, high = math.log10(min(ys)), math.log10(max(ys))
    margin = max(0.07 * (high - low), 0.03)
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - left) / ((right - left) or 1)
        up = (math.log10(y) - low) / (high - low)
        return x0 + LEFT + across * (WIDTH - LEFT - RIGHT), y0 + HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    edge, floor = x0 + WIDTH - RIGHT, y0 + HEIGHT - BOTTOM
    shapes: list[Line | Dot | Words] = [
        Words((x0 + LEFT, y0 + 18), panel.title, INK, size=13, bold=True),
        Words((x0 + LEFT, y0 + 34), panel.y_label, SOFT, size=11),
        Words((x0 + LEFT, y0 + HEIGHT - 10), panel.x_label, SOFT, size=11),
    ]
    for value in _ticks(low, high):
        _, y = place(math.exp(left), value)
        shapes.append(Line([(x0 + LEFT, y), (edge, y)], RULE))
        shapes.append(Words((x0 + LEFT - 6, y + 4), f"{value:g}", SOFT, "end", 11))
    for value, first, second in panel.ticks:
        x, _ = place(value, 10**low)
        shapes.append(Line([(x, floor), (x, floor + 4)], SOFT))
        shapes.append(Words((x, floor + 16), first, SOFT, "middle", 11))
        shapes.append(Words((x, floor + 29), second, SOFT, "middle", 10))
    for curve in panel.curves:
        where = [place(*point) for point in curve.points]
        shapes.append(Line(where, curve.colour, 2, curve.dashed))
        if not curve.dashed:
            shapes += [Dot(point, 1.5, curve.colour) for point in where]
    for curve in panel.curves:
        shapes += [Dot(place(*point), 3.5, curve.colour, ring=True) for point in curve.rings]
    ends = [(place(*curve.points[-1]), curve) for curve in panel.curves]
    heights = _spread([y for (_, y), _ in ends], y0 + TOP, floor)
    for ((x, _), curve), y in zip(ends, heights, strict=True):
        shapes.append(
            Words((max(x + 8, edge + 8) if x > edge - 1 else x + 8, y + 4), curve.label, curve.colour, size=11)
        )
    return shapes


def _spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights as near to the wanted ones as lines of text can be, in the same order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    heights = list(wanted)
    for before, i in pairwise(order):
        heights[i] = max(heights[i], heights[before] + LINE_HEIGHT)
    limit = max(bottom, top + LINE_HEIGHT * (len(wanted) - 1))
    for i in reversed(order):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - LINE_HEIGHT
    return heights


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them, or twos, where few would fit."""
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        values = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
        inside = [round(value, 12) for value in values if low <= math.log10(value) <= high]
        if len(inside) >= 4:
            break
    return inside
