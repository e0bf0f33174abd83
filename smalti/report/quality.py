"""Numbers of image quality for people: a table of several results in text, Markdown or HTML."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from smalti.evaluation.metric import Estimate
from smalti.evaluation.results import FloorValue, Number
from smalti.report.charts import Bar, error_bar_chart
from smalti.report.style import COLOURS, style

ARROWS = {"lower": "↓", "higher": "↑"}
CLEAN = "clean images"
_GREY = "#6b7280"
COLUMNS = 120  # of a terminal; tables may be wider, sentences are not


@dataclass(frozen=True)
class Column:
    """Numbers of one name, made in one way.

    Attributes:
        label: of the number; two columns never share it.
        best: name of the row that is better than every other by more than their intervals, real images aside, or "".
    """

    label: str
    metric: str
    better: Literal["lower", "higher"]
    best: str = ""


@dataclass(frozen=True)
class Row:
    """Measured numbers of one set of images, by column label."""

    name: str
    numbers: Mapping[str, Number]


@dataclass(frozen=True)
class CleanRow:
    """The same numbers of real images that are not in the reference."""

    name: str
    floors: Mapping[str, FloorValue]


@dataclass(frozen=True)
class QuotedRow:
    """What a paper prints.

    Attributes:
        setting: how it was trained and sampled, in words.
        numbers: by label.
        source: where it is printed. certainty: how sure the numbers are, in words.
    """

    name: str
    setting: str
    numbers: Mapping[str, float]
    source: str
    certainty: str
    note: str = ""


@dataclass(frozen=True)
class QualityTable:
    """Everything that is shown.

    Attributes:
        quoted_labels: columns of the published rows, which stand apart.
        statements: about pairs of rows.
        notes: footnotes of the measured table. quoted_notes: of the published one.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    clean: Sequence[CleanRow] = ()
    statements: Sequence[str] = ()
    notes: Sequence[str] = ()
    quoted_labels: Sequence[str] = ()
    quoted: Sequence[QuotedRow] = ()
    quoted_notes: Sequence[str] = ()


def with_error(value: float, reach: float | None) -> tuple[str, str]:
    """A value and the half-width of its interval, both to the second digit of the latter; "" where there is none."""
    if reach is None:
        return f"{value:.4g}", ""
    if reach <= 1e-9 * abs(value):  # rounding of float64 and nothing else, as for copies of one image
        return f"{value:.6g}", "0"
    decimals = _decimals(reach)
    return f"{value:z.{decimals}f}", f"{reach:.{decimals}f}"  # z: no -0.00


def _decimals(reach: float) -> int:
    """Behind the point, up to the second digit of a half-width."""
    return max(0, 1 - int(f"{reach:.1e}".partition("e")[2]))  # the exponent after rounding: 0.0996 is 0.10


def half_width(estimate: Estimate) -> float | None:
    """Half of the 95 % interval; where a bound of the metric cuts it, the longer side."""
    if estimate.low is None or estimate.high is None:
        return None
    return max(estimate.high - estimate.value, estimate.value - estimate.low)


def plus_minus(estimate: Estimate) -> str:
    """As "31.51 ± 0.42", or the value alone."""
    value, reach = with_error(estimate.value, half_width(estimate))
    return f"{value} ± {reach}" if reach else value


def floor_text(floor: FloorValue, beside: Sequence[Number]) -> str:
    """With the digits of the numbers beside it, which are what it is held against; but never as a mere 0."""
    reaches = [reach for number in beside if (reach := half_width(number.estimate))]
    if not reaches:
        return f"{floor.value:.4g} ({floor.count:,})"
    decimals = max(_decimals(reach) for reach in reaches)
    if floor.value and abs(floor.value) < 0.5 * 10.0**-decimals:
        decimals = math.ceil(-math.log10(abs(floor.value)))
    return f"{floor.value:.{decimals}f} ({floor.count:,})"


def as_text(table: QualityTable) -> str:
    """For a terminal."""
    head = ["images", *(f"{c.label} {ARROWS[c.better]}" for c in table.columns)]
    body = [[row.name, *(_cell_text(row, c) for c in table.columns)] for row in table.rows]
    clean = [[row.name, *(_clean_text(table, row, c) for c in table.columns)] for row in table.clean]
    lines = aligned([head, *body, *clean], numeric=range(1, len(head)), rule=True)
    lines += _listed(_all_notes(table))
    if table.statements:
        lines += _listed(table.statements)
    if table.quoted:
        lines += ["", "published, not measured here:"]
        quoted = [_quoted_head(table), *(_quoted_cells(table, row) for row in table.quoted)]
        lines += aligned(quoted, numeric=range(2, 2 + len(table.quoted_labels)), rule=True)
        lines += _listed(table.quoted_notes)
    return "\n".join(lines)


def as_markdown(table: QualityTable) -> str:
    """For a README or an issue."""
    head = ["images", *(f"{c.label} {ARROWS[c.better]}" for c in table.columns)]
    body = [[row.name, *(_cell_text(row, c, mark="**") for c in table.columns)] for row in table.rows]
    clean = [[f"*{row.name}*", *(_clean_text(table, row, c) for c in table.columns)] for row in table.clean]
    lines = _markdown_table(head, [*body, *clean], numeric=range(1, len(head)))
    for part in (_all_notes(table, bold="bold"), table.statements):
        lines += ["", *(f"- {_plain(sentence)}" for sentence in part)] if part else []
    if table.quoted:
        lines += ["", "Published, not measured here:", ""]
        numeric = range(2, 2 + len(table.quoted_labels))
        lines += _markdown_table(_quoted_head(table), [_quoted_cells(table, r) for r in table.quoted], numeric=numeric)
        lines += ["", *(f"- {_plain(note)}" for note in table.quoted_notes)] if table.quoted_notes else []
    return "\n".join(lines) + "\n"


def measured_fragment(table: QualityTable, colours: Mapping[str, str] | None = None) -> str:
    """HTML of what was measured, for a page with the style of all pages: table, charts, sentences.

    Args:
        colours: of rows, by name, where the page has given them some; the other rows are grey. None = in order.
    """
    if colours is None:
        colours = {row.name: COLOURS[k % len(COLOURS)] for k, row in enumerate(table.rows)}
    head = "".join(f"<th>{escape(c.label)} {ARROWS[c.better]}</th>" for c in table.columns)
    body = [_html_row(table, row, colours) for row in table.rows]
    body += [
        f"<tr class='clean'><th>{escape(row.name)}</th>"
        + "".join(f"<td>{escape(_clean_text(table, row, c))}</td>" for c in table.columns)
        + "</tr>"
        for row in table.clean
    ]
    parts = [_html_table(f"<th>images</th>{head}", body), _html_list(_all_notes(table, bold="bold"))]
    parts.append(f"<div class='charts'>{''.join(_charts(table, colours))}</div>")
    parts.append(_html_list(table.statements))
    return "".join(parts)


def as_fragment(table: QualityTable) -> str:
    """The same, and what papers print apart from it, as sections of a page."""
    measured = f"<section><h2>Measured</h2>{measured_fragment(table)}</section>"
    if not table.quoted:
        return measured
    rows = ["".join(_quoted_html(table, row)) for row in table.quoted]
    quoted = _html_table("".join(f"<th>{escape(cell)}</th>" for cell in _quoted_head(table)), rows)
    return f"{measured}<section><h2>Published, not measured here</h2>{quoted}{_html_list(table.quoted_notes)}</section>"


def quality_page(table: QualityTable, title: str) -> str:
    """One self-contained HTML file."""
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{style()}</style>"
    )
    body = f"<body><main><h1>{escape(title)}</h1>{as_fragment(table)}</main></body>"
    return f"<!doctype html><html lang='en'><head>{head}</head>{body}</html>\n"


def _cell_text(row: Row, column: Column, mark: str = "") -> str:
    number = row.numbers.get(column.label)
    if number is None:
        return "-"
    text = plus_minus(number.estimate)
    best = column.best == row.name
    return (f"{mark}{text}{mark}" if mark else f"{text} *") if best else text


def _clean_text(table: QualityTable, row: CleanRow, column: Column) -> str:
    floor = row.floors.get(column.label)
    beside = [measured.numbers[column.label] for measured in table.rows if column.label in measured.numbers]
    return floor_text(floor, beside) if floor else "-"


def _all_notes(table: QualityTable, bold: str = "*") -> list[str]:
    numbers = [number for row in table.rows for number in row.numbers.values()]
    notes = []
    if any(half_width(number.estimate) is not None for number in numbers):
        notes.append("±: half the 95 % interval, from the choice of images.")
    if any(half_width(number.estimate) is None for number in numbers):
        notes.append("No ±: the uncertainty is unknown.")
    if any(column.best for column in table.columns):
        notes.append(f"{bold}: best, and its interval is clear of the next.")
    if table.clean:
        notes.append(f"{CLEAN}: real images that are not in the reference, in brackets how many.")
    return [*notes, *table.notes]


def _quoted_head(table: QualityTable) -> list[str]:
    return ["published", "setting", *table.quoted_labels, "source", "how sure"]


def _quoted_cells(table: QualityTable, row: QuotedRow) -> list[str]:
    numbers = [f"{row.numbers[label]:g}" if label in row.numbers else "-" for label in table.quoted_labels]
    note = f"; {row.note}" if row.note else ""
    return [row.name, row.setting, *numbers, row.source, row.certainty + note]


def _quoted_html(table: QualityTable, row: QuotedRow) -> list[str]:
    name, *cells = _quoted_cells(table, row)
    words = {0, len(cells) - 2, len(cells) - 1}
    kinds = (" class='words'" if k in words else "" for k in range(len(cells)))
    inside = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True))
    return [f"<tr><th class='words'>{escape(name)}</th>", inside, "</tr>"]


def _html_row(table: QualityTable, row: Row, colours: Mapping[str, str]) -> str:
    cells = []
    for column in table.columns:
        number = row.numbers.get(column.label)
        if number is None:
            cells.append("<td>-</td>")
            continue
        value, reach = with_error(number.estimate.value, half_width(number.estimate))
        error = f" <span class='pm'>± {reach}</span>" if reach else ""
        best = " class='best'" if column.best == row.name else ""
        cells.append(f"<td{best}>{value}{error}</td>")
    dot = f"<i class='dot' style='background:{colours.get(row.name, _GREY)}'></i>"
    return f"<tr><th>{dot}{escape(row.name)}</th>{''.join(cells)}</tr>"


def _charts(table: QualityTable, colours: Mapping[str, str]) -> list[str]:
    charts = []
    for column in table.columns:
        bars = [
            Bar(
                row.name, number.estimate.value, number.estimate.low, number.estimate.high, colours.get(row.name, _GREY)
            )
            for row in table.rows
            if (number := row.numbers.get(column.label)) is not None
        ]
        floors = [row.floors[column.label].value for row in table.clean if column.label in row.floors]
        # Several floors have no one place in the chart; they stand in the table.
        floor = floors[0] if len(floors) == 1 else None
        note = f"{column.better} is better" + (f"; dashed: {CLEAN}" if floor is not None else "")
        charts.append(f"<div>{error_bar_chart(bars, title=column.label, note=note, floor=floor)}</div>")
    return charts


def _html_table(head: str, rows: Sequence[str]) -> str:
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class='wide'><table class='quality'>{inside}</table></div>"


def _html_list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul class='quality-notes'>{items}</ul>" if items else ""


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int]) -> list[str]:
    marks = ["---:" if k in numeric else "---" for k in range(len(head))]
    lines = [" | ".join(map(_plain, cells)) for cells in (head, marks, *rows)]
    return [f"| {line} |" for line in lines]


def _plain(text: str) -> str:
    """Text that a Markdown table or list does not take apart."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def aligned(rows: Sequence[Sequence[str]], *, numeric: Sequence[int], rule: bool = False) -> list[str]:
    """Columns of text, the numeric ones ending below each other; `rule` draws a line under the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if k in numeric else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]] if rule else lines


def _listed(sentences: Sequence[str]) -> list[str]:
    """Sentences below a table, each cut where a terminal ends."""
    return ["", *(line for sentence in sentences for line in wrapped(sentence))] if sentences else []


def wrapped(text: str, indent: str = "") -> list[str]:
    """A sentence in lines of at most `COLUMNS`, all but the first further in."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
