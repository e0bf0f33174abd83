"""Numbers as people read them: digits that fit the error, tables that keep measured and published apart."""

import math
import re
from html.parser import HTMLParser

import pytest
from made_up_results import made_up, number

from smalti.evaluation.metric import Estimate
from smalti.evaluation.results import FloorValue
from smalti.report.charts import WIDTH, Bar, error_bar_chart
from smalti.report.one_result import render_origins, render_result
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
        (-0.0001, 0.014, "0.000 ± 0.014"),
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


def test_what_is_only_rounding_is_not_printed_to_its_second_digit():
    assert with_error(11.547649613587556, 1.2e-14) == ("11.5476", "0")


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
    assert re.fullmatch(r" +value +95 % interval +clean images", lines[1])
    assert re.fullmatch(r"  FID ↓ +31.51 ± 0.45 +31.06 to 31.96 +4.21 \(2,000\)", lines[2])
    assert re.fullmatch(r"  IS ↑ +9.1 +unknown", lines[3])
    assert lines[4:7] == [
        "  FID: 5,000 images are few for FID",
        "  IS: no splits of 5,000",
        "  3 of 5,000 images may be copies.",
    ]
    assert lines[7] == f"  protocol {result.protocol.digest[:12]}, smalti 0.1.0"
    assert lines[8].startswith("    images: 5,000 of 32 x 32, class labels random")
    text = "\n".join(lines[7:])
    for fact in ("guidance_scale 1.5", "inception aaaaaaaaaaaa", "emoji32 bbbbbbbbbbbb (1,906 images)", "smalti 0.1.0"):
        assert fact in text


def test_what_is_not_known_of_a_result_is_told_as_unknown():
    nothing = dict.fromkeys(("count", "image_size", "class_labels", "sampling", "ema", "precision", "inference"))
    result = made_up("png", [number("fid", 9.0, 0.1)], **nothing, decoder=None, network=None, reference=None)
    text = render_result(result)
    assert "images: unknown of unknown, class labels unknown, weights unknown, precision unknown" in text
    for part in ("sampling", "features", "reference"):
        assert f"    {part}: unknown" in text.splitlines()
    alone = made_up("is", [number("inception_score", 9.0, 0.1)], reference=None)
    assert "reference" not in render_result(alone)


def test_real_images_are_told_as_such_and_nothing_is_said_of_how_they_were_drawn():
    drawn = ("class_labels", "sampling", "ema", "precision", "inference", "decoder")
    text = render_result(made_up("emoji32", [number("fid", 9.0, 0.1)], **dict.fromkeys(drawn), real=True))
    assert "images: 5,000 of 32 x 32, real images of a data set" in text
    assert "unknown" not in text
    assert "sampling" not in text


def test_numbers_of_one_result_meet_at_their_signs():
    numbers = [number("fid", 1236.4, 21.2, floor=458.0), number("recall", 0.0812, 0.017, floor=0.81071)]
    lines = render_result(made_up("dit", numbers)).splitlines()[2:4]
    assert [line.index("±") for line in lines] == [lines[0].index("±")] * 2
    assert [line.index(" to ") for line in lines] == [lines[0].index(" to ")] * 2
    assert [line.rindex("(") for line in lines] == [lines[0].rindex("(")] * 2
    assert re.search(r" 458 \(2,000\)$", lines[0])


def test_one_caution_about_several_numbers_is_one_line_and_none_is_longer_than_a_terminal():
    few = "236 images are few; " + "say it at length " * 20
    numbers = [number("fid", 9.0, 0.1, caution=few), number("recall", 0.5, 0.1, caution=few)]
    result = made_up("dit", numbers, sentence="No copies. " * 20, sampling={f"setting_{k}": k for k in range(20)})
    lines = render_result(result).splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("236 images" in line for line in lines) == 1
    assert lines[4].startswith("  FID, Recall: 236 images are few; say it at length")


@pytest.mark.parametrize(
    ("floor", "value", "error", "shown"),
    [
        (0.002379, 1.253, 0.05, "0.002"),
        (0.02379, 1.253, 0.05, "0.02"),
        (-0.00032, 0.0021, 0.001, "-0.0003"),
        (457.82, 1236.0, 20.0, "458"),
        (0.3, 318.0, 53.0, "0.3"),
        (0.0096, 1.253, 0.05, "0.01"),
        (0.0, 1.253, 0.05, "0.00"),
        (50.7381, 450.0, None, "50.74"),
    ],
)
def test_a_floor_has_the_digits_of_the_numbers_beside_it_and_is_never_a_mere_zero(floor, value, error, shown):
    measured = number("fid", value, error, floor=floor)
    assert f" {shown} (2,000)" in render_result(made_up("dit", [measured]))
    columns, rows = [Column("FID", "fid", "lower")], [Row("dit", {"FID": measured})]
    text = as_text(QualityTable(columns, rows, [CleanRow("clean images", {"FID": measured.floor})]))
    assert f" {shown} (2,000)" in text


def test_several_results_share_what_is_said_of_how_they_were_made():
    a, b = (made_up(name, [number("fid", 9.0, 0.1)]) for name in "ab")
    c = made_up("c", [number("fid", 9.0, 0.1)], count=10)
    lines = render_origins([a, c, b]).splitlines()
    assert lines[:2] == ["a (runs/a)", "b (runs/b)"]
    at = lines.index("c (runs/c)")
    assert sum(line.startswith("  protocol ") for line in lines) == 2
    assert sum(line.startswith("  protocol ") for line in lines[:at]) == 1
    assert "± " not in "\n".join(lines)


def test_sentences_below_a_table_are_cut_where_a_terminal_ends():
    lines = as_text(table(statements=["word " * 50], notes=["other " * 50])).splitlines()
    assert all(len(line) <= 120 for line in lines if "word" in line or "other" in line)
    assert sum(line.startswith("  word") for line in lines) == 2


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
    assert lines[4].split() == ["clean", "images", "4.20", "(2,000)", "-"]
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
