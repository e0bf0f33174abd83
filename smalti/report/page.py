"""The page of a run: one self-contained HTML file, readable without a network, a script or a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from smalti.report.charts import Series, line_chart
from smalti.report.images import data_url, grid

PAIRS = 6
_STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True, eq=False)
class ClassRow:
    """Samples of one class, and the nearest training image of each."""

    name: str
    samples: Float[Tensor, "N 3 H W"]
    nearest: Float[Tensor, "N 3 H W"]


@dataclass(frozen=True)
class Snapshot:
    """Samples with the same seeds at one moment of the run."""

    caption: str
    url: str


@dataclass(frozen=True)
class Nearness:
    """Median distance (root mean square per pixel, of 255) to the nearest training image."""

    samples: float
    held_out: float
    copies: int
    count: int


@dataclass(frozen=True, eq=False)
class RunPage:
    """Everything the page shows.

    Args:
        facts: (number, what it is).
        training, validation: (step, loss).
        constant, linear: losses of the mean-image and the best linear denoiser; in all, and per eighth of the noise.
        settings: (name, value).
    """

    title: str
    lead: str
    verdict: str
    facts: Sequence[tuple[str, str]]
    rows: Sequence[ClassRow]
    snapshots: Sequence[Snapshot]
    training: Sequence[tuple[float, float]]
    validation: Sequence[tuple[float, float]]
    constant: float
    linear: float
    strata: Sequence[float]
    constant_strata: Sequence[float]
    linear_strata: Sequence[float]
    nearness: Nearness
    settings: Sequence[tuple[str, str]]


def render(page: RunPage) -> str:
    """The page as one HTML text."""
    facts = "".join(f"<div><b>{escape(number)}</b><span>{escape(what)}</span></div>" for number, what in page.facts)
    body = [
        f"<h1>{escape(page.title)}</h1><p class='soft'>{escape(page.lead)}</p>",
        f"<p><b>{escape(page.verdict)}</b></p><div class='facts'>{facts}</div>",
        _section(
            "Samples, by class",
            "Drawn from the averaged (EMA) weights. Nothing was picked: seeds in order.",
            _samples(page),
        ),
        _section("What it learned, and when", "The same seeds at several moments of the run.", _snapshots(page)),
        _section(
            "Loss",
            "Validation: held-out images, with noise and levels fixed for the whole run, unweighted as are the dashed "
            "lines. A network above the linear line has only learned a filter. Training weighs its levels, so that its "
            "curve shows progress and is not to be compared with the others.",
            _charts(page),
        ),
        _section("Learned or remembered?", _nearness_text(page.nearness), _neighbours(page)),
        _section("Settings", "", _table(page.settings)),
    ]
    head = [
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{escape(page.title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style>",
    ]
    shown = f"<body><main>{''.join(body)}</main></body>"
    return f"<!doctype html><html lang='en'><head>{''.join(head)}</head>{shown}</html>\n"


def _section(title: str, text: str, content: str) -> str:
    lead = f"<p class='soft'>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{content}</section>"


def _strip(images: Float[Tensor, "N 3 H W"], alt: str, *, size: int) -> str:
    """Images side by side, each enlarged by a whole number to at most `size` pixels."""
    sheet = grid(images, columns=len(images))
    scale = max(1, size // images.shape[-1])
    return f"<img src='{data_url(sheet)}' width='{sheet.width * scale}' alt='{escape(alt)}'>"


def _samples(page: RunPage) -> str:
    return "".join(_row(row.name, _strip(row.samples, f"samples of {row.name}", size=96)) for row in page.rows)


def _row(name: str, content: str) -> str:
    return f"<div class='row'><span>{escape(name)}</span>{content}</div>"


def _snapshots(page: RunPage) -> str:
    figures = (
        f"<figure><img src='{s.url}' alt='{escape(s.caption)}'><figcaption>{escape(s.caption)}</figcaption></figure>"
        for s in page.snapshots
    )
    return f"<div class='panels'>{''.join(figures)}</div>"


def _charts(page: RunPage) -> str:
    ends = (page.validation[0][0], page.validation[-1][0])
    # The mean image's loss can lie orders of magnitude above everything else, where it would flatten the picture.
    show_constant = page.constant < 10 * max(y for _, y in page.validation)
    by_step = line_chart(
        [
            Series("training, as weighted", page.training, "#9bb0cc"),
            Series("validation", page.validation, "#2563eb", markers=True),
            Series("best linear denoiser", [(x, page.linear) for x in ends], "#d97706", dashed=True),
            Series("mean image", [(x, page.constant) for x in ends] if show_constant else [], "#9ca3af", dashed=True),
        ],
        x_label="step",
        y_label="loss",
    )
    eighths = range(len(page.strata))
    show_constant = max(page.constant_strata) < 30 * max(page.linear_strata)
    by_noise = line_chart(
        [
            Series("network", list(zip(eighths, page.strata, strict=True)), "#2563eb", markers=True),
            Series("best linear denoiser", list(zip(eighths, page.linear_strata, strict=True)), "#d97706", dashed=True),
            Series(
                "mean image",
                list(zip(eighths, page.constant_strata, strict=True)) if show_constant else [],
                "#9ca3af",
                dashed=True,
            ),
        ],
        x_label="eighth of the noise range, from nearly clean to pure noise",
        y_label="validation loss at the end",
        x_ticks=[(k, str(k + 1)) for k in eighths],
    )
    return f"<div class='charts'><div>{by_step}</div><div>{by_noise}</div></div>"


def _nearness_text(n: Nearness) -> str:
    return (
        f"Left of each pair a sample, right the training image nearest to it. Median distance to the nearest training "
        f"image, in grey levels per pixel: samples {n.samples:.1f}, held-out real images {n.held_out:.1f}. "
        f"{n.copies} of {n.count} samples lie nearer than nine in ten held-out images do, and may be copies."
    )


def _neighbours(page: RunPage) -> str:
    return "".join(_row(row.name, f"<div class='panels'>{_pairs(row)}</div>") for row in page.rows)


def _pairs(row: ClassRow) -> str:
    pairs = []
    for sample, near in zip(row.samples[:PAIRS], row.nearest[:PAIRS], strict=True):
        images = _strip(sample[None], "sample", size=64) + _strip(near[None], "nearest training image", size=64)
        pairs.append(f"<div class='pair'>{images}</div>")
    return "".join(pairs)


def _table(settings: Sequence[tuple[str, str]]) -> str:
    rows = (f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>" for name, value in settings)
    return f"<table>{''.join(rows)}</table>"
