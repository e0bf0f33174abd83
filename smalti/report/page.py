"""The page of a comparison: one self-contained HTML file, readable without a network, a script or a server."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from jaxtyping import Float
from torch import Tensor

from smalti.report.charts import Series, line_chart
from smalti.report.images import data_url, grid
from smalti.report.quality import QualityTable, measured_fragment
from smalti.report.style import COLOURS, style


@dataclass(frozen=True)
class Snapshot:
    """Samples with the same seeds at one moment of the run, side by side."""

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
class NetworkRun:
    """One network of the comparison.

    Args:
        samples: of each class in turn, the same seeds for every network.
        nearest: the training image that is nearest to each sample.
        validation: (step, loss). strata: the last loss per eighth of the noise range.
        cost: (what, value) in the order of the table's columns, the same for all networks.
    """

    name: str
    samples: Sequence[Float[Tensor, "N 3 H W"]]
    nearest: Sequence[Float[Tensor, "N 3 H W"]]
    snapshots: Sequence[Snapshot]
    validation: Sequence[tuple[float, float]]
    strata: Sequence[float]
    cost: Sequence[tuple[str, str]]
    nearness: Nearness


@dataclass(frozen=True, eq=False)
class ComparisonPage:
    """Everything the page shows.

    Args:
        verdict: one sentence a paragraph.
        facts: (number, what it is).
        constant, linear: losses of the mean-image and the best linear denoiser; in all, and per eighth of the noise.
        settings: (name, value).
        quality: metrics of all networks, or one sentence that says why there are none.
    """

    title: str
    lead: str
    verdict: Sequence[str]
    facts: Sequence[tuple[str, str]]
    class_names: Sequence[str]
    networks: Sequence[NetworkRun]
    constant: float
    linear: float
    constant_strata: Sequence[float]
    linear_strata: Sequence[float]
    settings: Sequence[tuple[str, str]]
    quality: QualityTable | str


def render(page: ComparisonPage) -> str:
    """The page as one HTML text.

    Raises:
        ValueError: there is no network, or more than there are colours.
    """
    if not 1 <= len(page.networks) <= len(COLOURS):
        raise ValueError(f"a comparison shows 1 to {len(COLOURS)} networks, got {len(page.networks)}")
    facts = "".join(f"<div><b>{escape(number)}</b><span>{escape(what)}</span></div>" for number, what in page.facts)
    verdict = "".join(f"<p><b>{escape(sentence)}</b></p>" for sentence in page.verdict)
    body = [
        f"<h1>{escape(page.title)}</h1><p class='soft'>{escape(page.lead)}</p>",
        f"{verdict}<div class='facts'>{facts}</div>",
        _section(
            "Samples, side by side",
            "Drawn from the averaged (EMA) weights. Nothing was picked: the same seeds and start noise in every "
            "column, in order.",
            _samples(page),
        ),
        _section(
            "Loss",
            "Held-out images, with noise and levels fixed and the same for all, unweighted as are the dashed lines. A "
            "network above the linear line has only learned a filter.",
            _charts(page),
        ),
        _section(
            "Cost",
            "Multiply-adds are those of one forward pass per image of a batch, scans and Fourier transforms included; "
            "they are what was made equal. Seconds and memory are of a training step, measured on this machine.",
            _cost(page),
        ),
        _section(
            "Quality, measured on features",
            "Samples of each network, the same seeds and classes for all, against the training images, in the features "
            "of a network that was trained on photos. Intervals are of the choice of images; another seed of the "
            "training would move the numbers, too.",
            _quality(page),
        ),
        _section("What they learned, and when", "The same seeds at several moments of each run.", _snapshots(page)),
        _section(
            "Learned or remembered?",
            "Median distance to the nearest training image, in grey levels per pixel. What lies nearer than nine in "
            "ten held-out images do may be a copy. Below, left of each pair a sample, right the training image nearest "
            "to it, one pair a class.",
            _nearness(page) + _neighbours(page),
        ),
        _section("Settings", "", _settings(page.settings)),
    ]
    head = [
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{escape(page.title)}</title><style>{style()}</style>",
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


def _samples(page: ComparisonPage) -> str:
    columns = f"style='grid-template-columns: 100px repeat({len(page.networks)}, 1fr)'"
    cells = ["<span></span>", *(f"<b>{_dot(k)}{escape(n.name)}</b>" for k, n in enumerate(page.networks))]
    for row, name in enumerate(page.class_names):
        cells.append(f"<span>{escape(name)}</span>")
        cells += [_strip(n.samples[row], f"{n.name}: samples of {name}", size=64) for n in page.networks]
    return f"<div class='matrix' {columns}>{''.join(cells)}</div>"


def _dot(k: int) -> str:
    return f"<i class='dot' style='background:{COLOURS[k]}'></i>"


def _charts(page: ComparisonPage) -> str:
    losses = [y for n in page.networks for _, y in n.validation]
    ends = (
        min(x for n in page.networks for x, _ in n.validation),
        max(x for n in page.networks for x, _ in n.validation),
    )
    # The mean image's loss can lie far above everything else, where it would flatten the picture.
    show_constant = page.constant < 2 * max(losses)
    by_step = line_chart(
        [
            *(Series(n.name, n.validation, COLOURS[k], markers=True) for k, n in enumerate(page.networks)),
            Series("best linear denoiser", [(x, page.linear) for x in ends], "#d97706", dashed=True),
            Series("mean image", [(x, page.constant) for x in ends] if show_constant else [], "#9ca3af", dashed=True),
        ],
        x_label="step",
        y_label="validation loss",
    )
    eighths = range(len(page.linear_strata))
    show_constant = max(page.constant_strata) < 30 * max(page.linear_strata)
    by_noise = line_chart(
        [
            *(
                Series(n.name, list(zip(eighths, n.strata, strict=True)), COLOURS[k], markers=True)
                for k, n in enumerate(page.networks)
            ),
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


def _cost(page: ComparisonPage) -> str:
    head = "".join(f"<th>{escape(what)}</th>" for what, _ in page.networks[0].cost)
    rows = "".join(
        f"<tr><th>{_dot(k)}{escape(n.name)}</th>{''.join(f'<td>{escape(value)}</td>' for _, value in n.cost)}</tr>"
        for k, n in enumerate(page.networks)
    )
    return f"<div class='wide'><table><tr><th>network</th>{head}</tr>{rows}</table></div>"


def _quality(page: ComparisonPage) -> str:
    if isinstance(page.quality, str):
        return f"<p>{escape(page.quality)}</p>"
    return measured_fragment(page.quality, {n.name: COLOURS[k] for k, n in enumerate(page.networks)})


def _snapshots(page: ComparisonPage) -> str:
    rows = []
    for n in page.networks:
        figures = "".join(_figure(snapshot) for snapshot in n.snapshots)
        rows.append(_row(n.name, f"<div class='moments'>{figures}</div>"))
    return "".join(rows)


def _figure(snapshot: Snapshot) -> str:
    caption = escape(snapshot.caption)
    return (
        f"<figure><figcaption>{caption}</figcaption><img class='strip' src='{snapshot.url}' alt='{caption}'></figure>"
    )


def _row(name: str, content: str) -> str:
    return f"<div class='row'><span>{escape(name)}</span>{content}</div>"


def _nearness(page: ComparisonPage) -> str:
    real = page.networks[0].nearness.held_out
    rows = [f"<tr><th>held-out real images</th><td>{real:.1f}</td><td></td></tr>"]
    for k, n in enumerate(page.networks):
        near = f"{n.nearness.copies} of {n.nearness.count}"
        rows.append(f"<tr><th>{_dot(k)}{escape(n.name)}</th><td>{n.nearness.samples:.1f}</td><td>{near}</td></tr>")
    head = "<tr><th>images</th><th>median distance</th><th>may be copies</th></tr>"
    return f"<div class='wide'><table>{head}{''.join(rows)}</table></div>"


def _neighbours(page: ComparisonPage) -> str:
    return "".join(_row(n.name, f"<div class='panels'>{_pairs(n)}</div>") for n in page.networks)


def _pairs(network: NetworkRun) -> str:
    pairs = []
    for samples, nearest in zip(network.samples, network.nearest, strict=True):
        images = _strip(samples[:1], "sample", size=64) + _strip(nearest[:1], "nearest training image", size=64)
        pairs.append(f"<div class='pair'>{images}</div>")
    return "".join(pairs)


def _settings(settings: Sequence[tuple[str, str]]) -> str:
    rows = (f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>" for name, value in settings)
    return f"<table>{''.join(rows)}</table>"
