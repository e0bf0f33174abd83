"""What papers print, as rows of a block of its own below what was measured."""

from collections.abc import Iterator, Sequence

from smalti.presets.published import METRICS_PRINTED, PublishedResult
from smalti.report.quality import QuotedRow

_LABELS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "Precision", "recall": "Recall"}
_CERTAINTY = {
    "paper": "printed in its paper",
    "readme": "in its authors' README",
    "table image": "read from a picture of the paper's table",
    "quoted": "printed in another paper",
    "plot": "read off a plot, 3 % either way",
    "derived": "derived from a stated difference",
    "secondhand": "from a summary, not seen in the paper",
}
_SILENT = ("class_labels", "precision", "feature weights", "reference", "code")


def quoted_labels(rows: Sequence[PublishedResult]) -> list[str]:
    """The columns that these rows fill, in the order of papers."""
    return [_LABELS[name] for name in METRICS_PRINTED if any(name in row.numbers() for row in rows)]


def quoted_row(row: PublishedResult) -> QuotedRow:
    """One published result with the setting that its paper states, in words."""
    guided = {None: "guidance not stated", 1.0: "no guidance"}.get(row.guidance_scale, f"guidance {row.guidance_scale}")
    channels = f" ({row.guidance_channels} channels)" if row.guidance_channels else ""
    sampler = f"{row.sampler} {row.num_inference_steps or ''}".strip()
    parts = (
        f"{row.dataset} {row.resolution}",
        f"{row.steps:,} steps" if row.steps else "",
        guided + channels,
        sampler,
        f"{row.decoder} decoder" if row.decoder else "",
    )
    numbers = {_LABELS[name]: value for name, value in row.numbers().items()}
    certainty = _CERTAINTY[row.certainty]
    return QuotedRow(row.title, ", ".join(filter(None, parts)), numbers, row.source, certainty, row.note)


def quoted_notes(rows: Sequence[PublishedResult]) -> Iterator[str]:
    """What must be known of the block: which parts of the protocol its rows state, and which they do not."""
    if not rows:
        return
    stated = [set(row.stated()) for row in rows]
    always = [name for name in rows[0].stated() if all(name in parts for parts in stated)]
    names = dict.fromkeys(name for row in rows for name in row.stated())
    sometimes = [name for name in names if name not in always]
    some = f"; some rows also {', '.join(sometimes)}" if sometimes else ""
    yield (
        f"Of the protocol these rows record {', '.join(always) or 'nothing that all of them state'}{some}, as stated. "
        f"Not recorded are {', '.join(_SILENT)}, and errors: no number here is compared with a measured one."
    )
