"""Charts as inline SVG: few enough to write by hand, so that a page needs no script and no plotting package."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40


@dataclass(frozen=True)
class Series:
    """One line.

    Args:
        points: (x, y); an empty series is left out.
        colour: any CSS colour. dashed: for lines to compare with.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    markers: bool = False


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, x_ticks: Sequence[tuple[float, str]] = ()
) -> str:
    """An SVG element; y is logarithmic where the values span more than a factor of six.

    Args:
        x_ticks: (position, text); empty = round numbers.

    Raises:
        ValueError: there is no point at all, or a value is not finite.
    """
    series = [s for s in series if s.points]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    if not xs or not all(map(math.isfinite, [*xs, *ys])):
        raise ValueError(f"a chart needs finite points, got {len(xs)} points in {len(series)} series")
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > 6
    scale = math.log10 if logarithmic else float
    low, high = scale(min(ys)), scale(max(ys))
    margin = 0.06 * (high - low) or 0.5
    low, high = (low - margin, high + margin) if logarithmic or low > margin else (min(0.0, low), high + margin)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for value in _log_ticks(low, high) if logarithmic else _ticks(low, high):
        _, y = place(x_low, value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for value, text in x_ticks or [(t, f"{t:g}") for t in _ticks(x_low, x_high)]:
        x, _ = place(value, ys[0])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(text)}</text>')
    for s in series:
        where = [place(*point) for point in s.points]
        dash = ' stroke-dasharray="6 4"' if s.dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(f'<polyline fill="none" stroke="{s.colour}" stroke-width="2"{dash} points="{path}"/>')
        if s.markers:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{s.colour}"/>' for x, y in where]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text></svg>')
    return f'<div class="legend">{_legend(series)}</div>' + "".join(parts)


@dataclass(frozen=True)
class Bar:
    """A number with its interval; None where there is none."""

    label: str
    value: float
    low: float | None
    high: float | None
    colour: str


_LETTERS, _LETTER, _ROW = 26, 6.6, 26  # of a name at most; width of one; height of a row


def error_bar_chart(bars: Sequence[Bar], *, title: str, note: str = "", floor: float | None = None) -> str:
    """An SVG element with a row a number: a dot at its value, a line along its interval.

    Args:
        note: beside the title, in words.
        floor: a dashed line, for what one compares with.

    Raises:
        ValueError: there is no number, or one that is not finite.
    """
    values = [v for bar in bars for v in (bar.value, bar.low, bar.high) if v is not None]
    values += [] if floor is None else [floor]
    if not bars or not all(map(math.isfinite, values)):
        raise ValueError(f"a chart needs finite numbers, got {len(bars)} rows")
    logarithmic = min(values) > 0 and max(values) / min(values) > 20
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 0.5
    low, high = low - margin, high + margin
    top, right = 30, WIDTH - RIGHT - 8
    left = 22 + _LETTER * min(_LETTERS, max(len(bar.label) for bar in bars))
    bottom = top + _ROW * len(bars) + 4

    def place(value: float) -> float:
        return left + (scale(value) - low) / (high - low) * (right - left)

    parts = [
        f'<svg class="bars" viewBox="0 0 {WIDTH} {bottom + 24}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="0" y="16">{escape(title)}</text>',
        f'<text x="{right}" y="16" text-anchor="end">{escape(note)}</text>',
    ]
    for tick in _log_ticks(low, high) if logarithmic else _ticks(low, high):
        x = place(tick)
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:.6g}</text>')
    if floor is not None:
        x = place(floor)
        parts.append(f'<line class="floor" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke-dasharray="6 4"/>')
    for k, bar in enumerate(bars):
        y = top + _ROW * (k + 0.5) + 2
        name = bar.label if len(bar.label) <= _LETTERS else bar.label[: _LETTERS - 1] + "…"
        parts.append(f'<text x="0" y="{y + 4:.1f}">{escape(name)}<title>{escape(bar.label)}</title></text>')
        if bar.low is not None and bar.high is not None:
            ends = place(bar.low), place(bar.high)
            parts.append(
                f'<path fill="none" stroke="{bar.colour}" stroke-width="2" d="M{ends[0]:.1f} {y - 5:.1f}v10'
                f'M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}M{ends[1]:.1f} {y - 5:.1f}v10"/>'
            )
        parts.append(f'<circle cx="{place(bar.value):.1f}" cy="{y:.1f}" r="4" fill="{bar.colour}"/>')
    return "".join(parts) + "</svg>"


def _legend(series: Sequence[Series]) -> str:
    return "".join(
        f'<span><i style="border-top:2px {"dashed" if s.dashed else "solid"} {s.colour}"></i>{escape(s.label)}</span>'
        for s in series
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    candidates = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [value for value in candidates if low <= math.log10(value) <= high]
    return inside if len(inside) <= 8 else [value for value in inside if math.log10(value) == round(math.log10(value))]
