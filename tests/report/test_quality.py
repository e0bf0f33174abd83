"""Numbers as people read them: digits that fit the error, tables that keep measured and published apart."""

import math
import re
from html.parser import HTMLParser

import pytest
from made_up_results import made_up, number

from smalti.evaluation.metric import Estimate
from smalti.evaluation.results import FloorValue
from smalti.report.charts import WIDTH, Bar, error_bar_chart
from smalti.report.quality import (
    CleanRow,
    Column,
    QualityTable,
    QuotedRow,
    Row,
    as_fragment,
    as_markdown,
    as_text,
    half_width,
    plus_minus,
    quality_page,
    render_result,
    with_error,
)


@pytest.mark.parametrize(
    ("value", "reach", "shown"),
    [
        (31.5123, 0.4213, "31.51 ± 0.42"),
        (31.5123, 1.0, "31.5 ± 1.0"),
        (317.7, 121.3, "318 ± 121"),
        (0.61234, 0.0996, "0.61 ± 0.10"),
        (9.999, 0.995, "10.00 ± 0.99"),  # the float lies below: rounded to even would be 1.0
        (0.001234, 0.0000561, "0.001234 ± 0.000056"),
        (-0.0018, 0.0021, "-0.0018 ± 0.0021"),
        (5.0, 0.0, "5 ± 0"),
        (12345.678, 999.6, "12346 ± 1000"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves(value, reach, shown):
    assert " ± ".join(with_error(value, reach)) == shown


@pytest.mark.parametrize("exponent", range(-6, 4))
def test_a_rounded_number_is_nearer_to_the_truth_than_a_twentieth_of_its_error(exponent):
    for k in range(10, 100):
        reach, value = k / 10 * 10.0**exponent, math.pi * 10.0 ** (exponent + 1)
        shown, error = with_error(value, reach)
        assert abs(float(shown) - value) <= reach / 19
        assert abs(float(error) - reach) <= reach / 19


def test_an_interval_that_a_bound_cuts_shows_its_longer_side_and_none_shows_none():
    assert half_width(Estimate(0.99, 0.01, 0.97, 1.0)) == pytest.approx(0.02)
    assert half_width(Estimate(0.99)) is None
    assert plus_minus(Estimate(12.34567)) == "12.35"


def test_one_result_is_told_with_all_that_one_must_know_before_quoting_it():
    result = made_up(
        "dit",
        [
            number("fid", 31.512, 0.2, floor=4.21, caution="5,000 images are few for FID"),
            number("inception_score", 9.1, None, caution="no splits of 5,000"),
        ],
        sentence="3 of 5,000 images may be copies.",
    )
    lines = render_result(result).splitlines()
    assert lines[0] == "dit (runs/dit)"
    assert re.fullmatch(r"  FID ↓ +31.51 ± 0.45 +95 % interval 31.06 to 31.96 +clean images: 4.21 \(2,000\)", lines[1])
    assert re.fullmatch(r"  IS ↑ +9.1 +uncertainty unknown", lines[2])
    assert lines[3:6] == [
        "  caution, FID: 5,000 images are few for FID",
        "  caution, IS: no splits of 5,000",
        "  3 of 5,000 images may be copies.",
    ]
    assert lines[6].startswith(
        f"  protocol {result.protocol.digest[:12]}: 5,000 images of 32 x 32, class labels random"
    )
    text = "\n".join(lines[6:])
    for fact in ("guidance_scale 1.5", "inception aaaaaaaaaaaa", "emoji32 bbbbbbbbbbbb (1,906 images)", "smalti 0.1.0"):
        assert fact in text


def test_what_is_not_known_of_a_result_is_told_as_unknown():
    nothing = dict.fromkeys(("count", "image_size", "class_labels", "sampling", "ema", "precision", "inference"))
    result = made_up("png", [number("fid", 9.0, 0.1)], **nothing, decoder=None, network=None, reference=None)
    text = render_result(result)
    assert "unknown images of unknown, class labels unknown, weights unknown, precision unknown" in text
    assert "sampling: unknown" in text
    assert "features: unknown; reference: unknown" in text
    alone = made_up("is", [number("inception_score", 9.0, 0.1)], reference=None)
    assert "reference" not in render_result(alone)


def table(**changes):
    a, b = number("fid", 31.5, 0.2), number("fid", 40.25, None)
    values = {
        "columns": [Column("FID", "fid", "lower", best="net <a|1>"), Column("IS", "inception_score", "higher")],
        "rows": [
            Row("net <a|1>", {"FID": a, "IS": number("inception_score", 9.0, 0.1)}),
            Row("b", {"FID": b}),
        ],
        "clean": [CleanRow("clean images", {"FID": FloorValue(4.2, 2000)})],
        "statements": ["FID: <a> is better"],
        "notes": ["a note & more"],
        "quoted_labels": ["FID", "sFID"],
        "quoted": [QuotedRow("DiT-XL/2", "guidance 1.5", {"FID": 2.27}, "arXiv:1", "printed in its paper", "a <note>")],
        "quoted_notes": ["the paper states little"],
    }
    return QualityTable(**values | changes)


def test_the_text_has_a_row_a_result_and_published_numbers_in_a_block_of_their_own():
    lines = as_text(table()).splitlines()
    assert lines[0].split() == ["images", "FID", "↓", "IS", "↑"]
    assert lines[2].split()[2:] == ["31.50", "±", "0.45", "*", "9.00", "±", "0.23"]
    assert lines[3].split() == ["b", "40.25", "-"]
    assert lines[4].split() == ["clean", "images", "4.2", "(2,000)", "-"]
    ends = {line.index(end) + len(end) for line, end in zip(lines[2:5], ("*", "40.25", "(2,000)"), strict=True)}
    assert len(ends) == 1  # numbers end below each other
    at = lines.index("published, not measured here:")
    assert "2.27" not in "\n".join(lines[:at])
    assert "2.27" in lines[at + 3]
    assert "31.50" not in "\n".join(lines[at:])
    assert "No ±: the uncertainty is unknown." in lines
    assert lines[-1] == "the paper states little"


def test_a_table_without_marks_floors_and_errors_explains_none():
    plain = table(
        columns=[Column("FID", "fid", "lower")], rows=[Row("b", {"FID": number("fid", 1.0, None)})], clean=[], quoted=[]
    )
    text = as_text(plain)
    assert "*" not in text
    assert "±: half" not in text
    assert "published" not in text
    assert "clean" not in text


def test_every_line_of_a_markdown_table_has_the_same_number_of_cells():
    lines = as_markdown(table()).splitlines()
    tables = [
        [line for line in lines if line.startswith("|")][:5],
        [line for line in lines if line.startswith("|")][5:],
    ]
    for part, cells in zip(tables, (3, 6), strict=True):
        assert {len(re.split(r"(?<!\\)\|", line)) - 2 for line in part} == {cells}
    assert "| net &lt;a\\|1> | **31.50 ± 0.45** |" in "\n".join(lines)


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_stands_alone_and_lets_nothing_become_markup():
    html = quality_page(table(), "Quality <of> images")
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "form"} & set(reader.tags)
    assert "http" not in html
    assert "url(" not in html
    for raw in ("<a|1>", "<a>", "<of>", "<note>", "note & more"):
        assert raw not in html
    assert html.count("<svg") == 2
    assert "prefers-color-scheme: dark" in html
    assert as_fragment(table()) in html


def test_the_chart_places_numbers_intervals_and_the_floor_where_their_values_say():
    bars = [Bar("a", 10.0, 8.0, 12.0, "red"), Bar("b", 14.0, None, None, "blue")]
    svg = error_bar_chart(bars, title="FID", floor=6.0)
    first, second = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg))
    (floor,) = (float(x) for x in re.findall(r'class="floor" x1="([\d.]+)"', svg))
    start, end = (float(x) for x in re.search(r'd="M([\d.]+) .*H([\d.]+)M', svg).groups())
    unit = (second - first) / 4
    assert start == pytest.approx(first - 2 * unit, abs=0.11)
    assert end == pytest.approx(first + 2 * unit, abs=0.11)
    assert floor == pytest.approx(first - 4 * unit, abs=0.11)
    assert svg.count("<path") == 1
    assert second <= WIDTH


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [0.0], [-1e-3, 2e-3], [0.5, 400.0], [1e-9, 2e-9]])
def test_any_numbers_get_a_chart_with_ticks_inside_it(values):
    svg = error_bar_chart([Bar(f"{v}", v, v - 1e-10, v + 1e-10, "red") for v in values], title="x")
    assert "nan" not in svg
    assert 1 <= len(re.findall(r'class="rule"', svg)) <= 12
    assert all(0 <= float(x) <= WIDTH for x in re.findall(r' (?:x|x1|x2|cx)="([-\d.]+)"', svg))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_chart_of_nothing_or_of_what_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="finite numbers, got 0 rows"):
        error_bar_chart([], title="x")
    for bar in (Bar("a", value, None, None, "red"), Bar("a", 1.0, 0.0, value, "red")):
        with pytest.raises(ValueError, match="finite numbers"):
            error_bar_chart([bar], title="x")


def test_long_names_are_cut_in_the_chart_and_told_whole_to_who_points_at_them():
    svg = error_bar_chart([Bar("x" * 40 + "<", 1.0, None, None, "red")], title="t")
    assert "x" * 25 + "…" in svg
    assert f"<title>{'x' * 40}&lt;</title>" in svg
