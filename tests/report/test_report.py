import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.errors import StorageError
from smalti.evaluation.metric import Estimate
from smalti.evaluation.results import Number
from smalti.report.charts import HEIGHT, WIDTH, Series, line_chart
from smalti.report.images import data_url, first_of_rows, grid, save_grid, save_image, to_pil
from smalti.report.page import ComparisonPage, Nearness, NetworkRun, Snapshot, render
from smalti.report.quality import Column, QualityTable, Row

# --- charts


def chart(*series, **labels):
    return line_chart(series, **{"x_label": "step", "y_label": "loss"} | labels)


def points(svg):
    """Of every line, in pixels."""
    return [
        [tuple(map(float, p.split(","))) for p in text.split()]
        for text in re.findall(r'<polyline[^>]* points="([^"]*)"', svg)
    ]


def tick_labels(svg, anchor):
    return re.findall(rf'text-anchor="{anchor}">([^<]*)</text>', svg)


def test_points_lie_where_their_values_say():
    (line,) = points(chart(Series("a", [(0, 1.0), (5, 1.5), (10, 2.0)], "red")))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x0 < x1 < x2
    assert y0 > y1 > y2  # up is less in SVG
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)


def test_values_over_more_than_a_factor_of_six_are_drawn_by_their_logarithm():
    (line,) = points(chart(Series("a", [(0, 0.01), (1, 0.1), (2, 1.0)], "red")))
    heights = [y for _, y in line]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    (line,) = points(chart(Series("a", [(0, 0.0), (1, 0.5), (2, 1.0)], "red")))  # zero has no logarithm
    heights = [y for _, y in line]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="a chart needs finite points, got 2 points in 1 series"):
        chart(Series("a", [(0, 1.0), (1, value)], "red"))
    with pytest.raises(ValueError, match="finite"):
        chart(Series("a", [(value, 1.0)], "red"))


def test_a_chart_of_nothing_is_refused_and_an_empty_series_left_out():
    with pytest.raises(ValueError, match="got 0 points in 0 series"):
        chart(Series("a", [], "red"))
    svg = chart(Series("here", [(0, 1.0)], "red"), Series("not here", [], "blue"))
    assert ">here<" in svg
    assert "not here" not in svg


@pytest.mark.parametrize(
    "ys",
    [[1.0], [3.0, 3.0], [0.0, 0.0], [-5.0, 5.0], [1e-9, 1.0], [1e-6, 1.1e-6], [1e6, 1e6 + 1], [0.99, 6.1], [2, 13]],
)
@pytest.mark.parametrize("last", [1, 7, 100_000])
def test_any_values_get_a_few_ticks_inside_the_picture(ys, last):
    svg = chart(Series("a", [(last * k / max(1, len(ys) - 1), y) for k, y in enumerate(ys)], "red", markers=True))
    assert 1 <= len(tick_labels(svg, "end")) <= 12
    numbers = [float(v) for v in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy)="([-\d.]+)"', svg)]
    assert all(-1 <= v <= WIDTH + 1 for v in numbers)
    assert "nan" not in svg


def test_labels_and_ticks_cannot_become_markup():
    svg = chart(
        Series("<b>&amp", [(0, 1.0), (1, 2.0)], "red"),
        x_label="<script>",
        y_label='"><i>',
        x_ticks=[(0, "<0>"), (1, "a&b")],
    )
    for raw in ("<b>", "<script>", "<i>", "<0>", "a&b"):
        assert raw not in svg
    for safe in ("&lt;b&gt;&amp;amp", "&lt;script&gt;", "&quot;&gt;&lt;i&gt;", "&lt;0&gt;", "a&amp;b"):
        assert safe in svg


def test_dashes_and_markers_are_drawn_where_asked_for():
    svg = chart(
        Series("plain", [(0, 1.0), (1, 2.0)], "red"), Series("far", [(0, 1.5)], "blue", dashed=True, markers=True)
    )
    assert svg.count("stroke-dasharray") == 1
    assert svg.count("<circle") == 1
    assert "dashed blue" in svg
    assert "solid red" in svg


# --- images


def flat(value, count=1, height=4, width=6):
    return torch.full((count, 3, height, width), float(value))


def test_minus_one_is_black_and_one_is_white():
    for value, grey in ((-1.0, 0), (1.0, 255), (0.0, 128), (-3.0, 0), (3.0, 255)):
        assert set(to_pil(flat(value)[0]).tobytes()) == {grey}


def test_a_picture_keeps_rows_columns_and_channels_apart():
    image = torch.full((3, 2, 3), -1.0)
    image[0, 1, 2] = 1.0
    pil = to_pil(image)
    assert pil.size == (3, 2)
    assert pil.getpixel((2, 1)) == (255, 0, 0)
    assert pil.getpixel((1, 1)) == (0, 0, 0)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (6, 3, 2), (7, 3, 3), (2, 5, 1)])
def test_a_grid_is_filled_row_by_row_with_gaps_around(count, columns, rows):
    values = torch.linspace(-1, 1, count).view(-1, 1, 1, 1).expand(-1, 3, 4, 6)
    sheet = np.asarray(grid(values, columns=columns, gap=2))
    assert sheet.shape == (rows * 6 + 2, columns * 8 + 2, 3)
    ground = np.ones(sheet.shape[:2], dtype=bool)
    for k in range(count):
        top, left = 2 + k // columns * 6, 2 + k % columns * 8
        tile = sheet[top : top + 4, left : left + 6]
        assert (tile == np.asarray(to_pil(values[k]))).all()
        ground[top : top + 4, left : left + 6] = False
    assert (sheet[ground] == 235).all()


@pytest.mark.parametrize("factor", [1, 3])
def test_the_first_of_each_row_stand_side_by_side_in_their_own_size(factor):
    values = torch.linspace(-1, 1, 12).view(-1, 1, 1, 1).expand(-1, 3, 6, 6)
    sheet = grid(values, columns=4)
    sheet = sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST)
    strip = first_of_rows(sheet, columns=4, width=6)
    assert (np.asarray(strip) == np.asarray(grid(values[::4], columns=3))).all()


def test_a_small_grid_is_enlarged_by_a_whole_number_and_a_large_one_is_not(tmp_path):
    save_grid(flat(0.5, 4), tmp_path / "deep" / "small.png", columns=2)
    with Image.open(tmp_path / "deep" / "small.png") as image:
        assert image.size == (18 * 44, 14 * 44)
        small = image.resize((18, 14), Image.Resampling.NEAREST)
        assert (np.asarray(small) == np.asarray(grid(flat(0.5, 4), columns=2))).all()
    save_grid(flat(0.5, 1, 900, 900), tmp_path / "large.png", columns=1)
    with Image.open(tmp_path / "large.png") as image:
        assert image.size == (904, 904)


def test_a_saved_image_has_its_own_size_and_leaves_nothing_beside_it(tmp_path):
    save_image(flat(1.0)[0], tmp_path / "0.png")
    with Image.open(tmp_path / "0.png") as image:
        assert image.size == (6, 4)
        assert image.format == "PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["0.png"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for save in (lambda p: save_image(flat(1.0)[0], p), lambda p: save_grid(flat(1.0), p, columns=1)):
        with pytest.raises(StorageError, match=r"0\.png cannot be written: ") as caught:
            save(tmp_path / "file" / "0.png")
        assert "\n" not in str(caught.value)


def test_a_data_url_holds_the_whole_picture():
    image = to_pil(torch.linspace(-1, 1, 72).view(3, 4, 6))
    head, _, text = data_url(image).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as back:
        assert back.tobytes() == image.tobytes()


# --- the page


class Reader(HTMLParser):
    """Checks that every element is closed, and collects what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href", "data", "action", "srcset")]
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def network(name, shift=0.0, **changes):
    images = torch.linspace(-1, 1, 2 * 4 * 3 * 8 * 8).view(2, 4, 3, 8, 8) + shift
    values = {
        "name": name,
        "samples": list(images),
        "nearest": [images[0].flip(0), images[1]],
        "snapshots": [Snapshot("step 10", data_url(to_pil(images[0, 0])))],
        "validation": [(10, 0.9 + shift), (20, 0.6 + shift)],
        "strata": [0.1 * (k + 1) for k in range(8)],
        "cost": [("parameters", "1.5 M"), ("memory", "<12> MB")],
        "nearness": Nearness(samples=20.25, held_out=31.5, copies=2, count=8),
    }
    return NetworkRun(**values | changes)


def page(**changes):
    values = {
        "title": "Title & <more>",
        "lead": "Lead",
        "verdict": ["Below the line", "One seed"],
        "facts": [("3 min", "of training"), ("<9>", "steps")],
        "class_names": ["Cats & <dogs>", "Birds"],
        "networks": [network("Net <A>"), network("Net B", 0.1)],
        "constant": 1.5,
        "linear": 0.7,
        "constant_strata": [1.5] * 8,
        "linear_strata": [0.7] * 8,
        "settings": [("optimizer", '{"betas": [0.9, 0.99]}'), ("network", "<net>")],
        "quality": "Not measured: <missing>.",
    }
    return ComparisonPage(**values | changes)


@pytest.fixture(scope="module")
def html():
    return render(page())


def test_the_page_is_well_formed_and_stands_alone(html):
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert "http" not in html
    assert not {"script", "link", "iframe", "object", "form"} & set(reader.tags)
    assert reader.sources
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "@import" not in html
    assert "url(" not in html


def test_every_section_is_there_with_its_content(html):
    titles = ("Samples, side by side", "Loss", "Cost", "What they learned, and when", "Learned or remembered?")
    for title in (*titles, "Quality, measured on features", "Settings"):
        assert f"<h2>{title}</h2>" in html
    for said in (
        "Below the line",
        "One seed",
        "3 min",
        "step 10",
        "best linear denoiser",
        "mean image",
    ):
        assert said in html
    for name in ("Net &lt;A&gt;", "Net B"):
        assert f"alt='{name}: samples of Birds'" in html
        assert f"</i>{name}</th><td>1.5 M</td>" in html
    assert "<th>held-out real images</th><td>31.5</td>" in html
    assert "</i>Net &lt;A&gt;</th><td>20.2</td><td>2 of 8</td>" in html
    assert html.count("<svg") == 2
    assert html.count("class='pair'") == 2 * 2  # one a class and network


def test_each_network_has_one_colour_everywhere(html):
    first, second = re.findall(r"class='dot' style='background:(#\w+)'", html)[:2]
    assert first != second
    assert html.count(f"solid {first}") == html.count(f"solid {second}") == 2  # the legends of both charts
    assert html.count(f"background:{first}") == html.count(f"background:{second}") == 3  # samples, cost, nearness


def test_measured_quality_has_the_colours_that_its_networks_have_elsewhere():
    numbers = {"KID": Number("kid", "KID", "lower", Estimate(0.5, 0.1, 0.3, 0.7))}
    rows = [Row("Net B", numbers), Row("real", numbers), Row("Net <A>", numbers)]
    table = QualityTable(columns=[Column("KID", "kid", "lower")], rows=rows)
    html = render(page(quality=table))
    first, second = re.findall(r"class='dot' style='background:(#\w+)'", html)[:2]
    assert f"background:{first}'></i>Net &lt;A&gt;</th><td>0.50" in html
    assert f"background:{second}'></i>Net B</th><td>0.50" in html
    assert f"stroke='{first}'" in html or f'stroke="{first}"' in html or f"stroke:{first}" in html


def test_what_is_shown_cannot_become_markup(html):
    for raw in ("<more>", "<dogs>", "<9>", "<net>", "<A>", "<12>", "<missing>"):
        assert raw not in html
    for safe in ("Title &amp; &lt;more&gt;", "Cats &amp; &lt;dogs&gt;", "&lt;9&gt;", "&lt;net&gt;", "[0.9, 0.99]"):
        assert safe in html


def test_the_nearest_training_image_stands_right_of_its_sample(html):
    shown = page().networks[0]
    for samples, nearest in zip(shown.samples, shown.nearest, strict=True):
        left, right = (data_url(grid(t[:1], columns=1)) for t in (samples, nearest))
        assert re.search(re.escape(left) + r"'[^>]*><img src='" + re.escape(right), html)


def test_lines_far_above_everything_else_do_not_flatten_the_charts():
    far = render(page(constant=50.0, constant_strata=[50.0] * 8))
    assert "mean image" not in re.sub(r"<p.*?</p>", "", far)
    assert "best linear denoiser" in far


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        render(page(networks=[network("a", validation=[(10, math.nan)])]))


@pytest.mark.parametrize("count", [0, 7])
def test_no_network_and_more_than_there_are_colours_are_refused(count):
    with pytest.raises(ValueError, match=f"shows 1 to 6 networks, got {count}"):
        render(page(networks=[network(str(k)) for k in range(count)]))
