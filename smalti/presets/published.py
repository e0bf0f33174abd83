"""What papers print about the quality of their images: facts with their source, to stand beside measured numbers.

`published.csv` has one row a model and setting. Every row says how sure its numbers are:

paper        printed in the text or a table of the model's own paper
readme       in the README or the configuration of its authors' code
table image  in its paper, in a table that is a picture, and read from that
quoted       printed in another paper that compares with it; for a row of several sources, at least one number
plot         read off a plot, to about 3 %
derived      from a difference that the text states
secondhand   from a summary; not seen in the paper itself
"""

import csv
import dataclasses
import functools
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.presets import find_preset

_FILE = Path(__file__).with_name("published.csv")
METRICS_PRINTED = ("fid", "sfid", "inception_score", "precision", "recall")


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """A row. None is what the source does not say.

    Attributes:
        model: family, as "DiT".
        title: the network in the source's words. preset: the same network here, or "".
        resolution: side of the images in pixels.
        conditioning: how class labels come in, or "none".
        parameters_m: millions. gmacs: 10^9 multiply-adds of one forward; papers call it Gflops.
        gmacs_counting: checked (counted on the network, agrees), as printed, derived (see the note), or ours (counted
            on the released network, not printed).
        steps, batch_size, images_m: of training; images in millions.
        sampler, num_inference_steps, guidance_scale, guidance_channels: of sampling; guidance 1 is off.
        decoder: of latents.
        count: images behind the numbers.
        fid, sfid, inception_score, precision, recall: as printed.
        certainty: see the head of this file.
    """

    model: str
    title: str
    preset: str
    dataset: str
    resolution: int
    conditioning: str
    parameters_m: float | None
    gmacs: float | None
    gmacs_counting: Literal["", "checked", "as printed", "derived", "ours"]
    steps: int | None
    batch_size: int | None
    images_m: float | None
    sampler: str
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_channels: Literal["", "all", "3"]
    decoder: str
    count: int | None
    fid: float | None
    sfid: float | None
    inception_score: float | None
    precision: float | None
    recall: float | None
    source: str
    certainty: Literal["paper", "readme", "table image", "quoted", "plot", "derived", "secondhand"]
    note: str

    def numbers(self) -> dict[str, float]:
        """What is printed, by metric name."""
        values = {name: getattr(self, name) for name in METRICS_PRINTED}
        return {name: value for name, value in values.items() if value is not None}

    def stated(self) -> dict[str, str]:
        """The parts of the protocol that the source states, in words."""
        parts = {
            "images": f"{self.count:,}" if self.count is not None else "",
            "image_size": str(self.resolution),
            "sampler": self.sampler,
            "num_inference_steps": f"{self.num_inference_steps or ''}",
            "guidance_scale": f"{self.guidance_scale or ''}",
            "guidance_channels": self.guidance_channels,
            "decoder": self.decoder,
        }
        return {name: value for name, value in parts.items() if value}


def published(model: str | None = None, resolution: int | None = None) -> tuple[PublishedResult, ...]:
    """Rows of the table, in its order.

    Args:
        model: a preset in any spelling (its own resolution), or a family as "DiT" or "ADM"; None = all.
        resolution: side of the images in pixels; None = any.

    Raises:
        ConfigError: nothing is published about that model, or the file is not as it was shipped.
    """
    rows = _rows()
    if model is not None:
        rows = tuple(row for row in rows if model.lower() in (row.model.lower(), row.preset)) or _of_preset(model, rows)
    return tuple(row for row in rows if resolution is None or row.resolution == resolution)


def _of_preset(model: str, rows: tuple[PublishedResult, ...]) -> tuple[PublishedResult, ...]:
    known = [*dict.fromkeys(row.model for row in rows), *dict.fromkeys(row.preset for row in rows if row.preset)]
    try:
        name = find_preset(model).name
    except ConfigError:
        raise ConfigError(f"nothing is published here about {model!r}{did_you_mean(model, known)}") from None
    found = tuple(row for row in rows if row.preset == name)
    if not found:
        raise ConfigError(f"no paper here prints numbers of {name}{did_you_mean(name, known)}")
    return found


@functools.cache
def _rows() -> tuple[PublishedResult, ...]:
    hints = typing.get_type_hints(PublishedResult)
    with _FILE.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = [field.name for field in dataclasses.fields(PublishedResult)]
        if reader.fieldnames != names:
            raise ConfigError(f"{_FILE} has the columns {reader.fieldnames}, expected {names}; install smalti anew")
        return tuple(
            PublishedResult(**{name: _cell(hints[name], row[name], f"{_FILE.name}:{i}") for name in names})
            for i, row in enumerate(reader, start=2)
        )


def _cell(hint: Any, text: str, where: str) -> Any:
    choices = typing.get_args(hint)
    if hint is str:
        return text
    if typing.get_origin(hint) is Literal:
        if text not in choices:
            raise ConfigError(f"{where}: {text!r} is not one of {', '.join(map(repr, choices))}")
        return text
    kind = next((c for c in choices if c is not type(None)), hint)
    if not text and choices:
        return None
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{where}: {text!r} is no {kind.__name__}") from None
