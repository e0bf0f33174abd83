"""`presets`: every network with what is counted here beside what its source prints."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from smalti.config import did_you_mean
from smalti.cost import count_macs, count_parameters, on_meta
from smalti.errors import ConfigError
from smalti.presets import PRESETS, list_models


@dataclass(frozen=True)
class PresetRow:
    """One line of the table. Parameters in numbers, multiply-adds in 10^9; None where the source is silent.

    Args:
        fused: parameters of the inference form, which is also the one that `gmacs` counts and that papers print.
        gmacs: as the papers count, see `MacCount.published`.
    """

    name: str
    title: str
    sample_size: tuple[int, int]
    parameters: int
    trained: int
    fused: int
    published_millions: float | None
    gmacs: float
    published_gmacs: float | None
    source: str


def preset_rows(pattern: str) -> Iterator[PresetRow]:
    """Count every preset that matches, on the meta device: exact, and no memory for weights.

    Raises:
        ConfigError: no preset matches.
    """
    names = list_models(pattern)
    if not names:
        raise ConfigError(f"no preset matches {pattern!r}{did_you_mean(pattern, PRESETS)}")
    for name in names:
        preset = PRESETS[name]
        network = on_meta(preset.config)
        parameters = count_parameters(network)
        yield PresetRow(
            name=name,
            title=preset.title,
            sample_size=preset.config.sample_size,
            parameters=parameters.total,
            trained=parameters.trained,
            fused=parameters.fused,
            published_millions=preset.published.parameters_m,
            gmacs=round(count_macs(network, fused=True).published / 1e9, 4),
            published_gmacs=preset.published.gmacs,
            source=preset.source,
        )


def as_json(rows: Iterator[PresetRow]) -> Iterator[str]:
    """One JSON object per line."""
    return (json.dumps(asdict(row)) for row in rows)


_HEAD = ("preset", "latents", "parameters", "trained", "fused", "published", "GMACs", "published", "apart", "source")
_WIDTHS = (24, 7, 11, 11, 11, 9, 8, 9, 10, 36)
_NOTES = (
    "parameters: with the fixed position table; trained: without; fused: of the inference form, where it is another.",
    "Published: millions, as printed. GMACs: 10^9 multiply-adds of one forward of one image in the inference form;",
    "the papers print this number and call it Gflops. `smalti cost PRESET` counts what the papers leave out, too.",
)


def as_table(rows: Iterator[PresetRow]) -> Iterator[str]:
    """For people, line by line as it is known: to count them all takes most of a minute."""
    rows = iter(rows)
    first = next(rows)  # a wrong pattern is answered before there is a head
    yield _line(_HEAD)
    yield "-" * (sum(_WIDTHS) + 2 * len(_WIDTHS) - 2)
    for row in itertools.chain((first,), rows):
        yield _line(_cells(row))
    yield ""
    yield from _NOTES


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join(_pad(cell, width, i) for i, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))).rstrip()


def _cells(row: PresetRow) -> tuple[str, ...]:
    published = f"{row.published_millions:g} M" if row.published_millions is not None else ""
    gmacs = f"{row.published_gmacs:.2f}" if row.published_gmacs is not None else ""
    apart = _apart(row.gmacs, row.published_gmacs) if row.published_gmacs is not None else ""
    size = "x".join(map(str, row.sample_size))
    fused = f"{row.fused:,}" if row.fused != row.trained else ""
    counted = (f"{row.parameters:,}", f"{row.trained:,}", fused, published, f"{row.gmacs:.3f}", gmacs, apart)
    return (row.name, size, *counted, row.source)


def _apart(counted: float, published: float) -> str:
    """Two decimals are all that the papers print, so small networks can only be compared as printed."""
    return "as printed" if round(counted, 2) == published else f"{counted / published - 1:+.2%}"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if 2 <= column <= 8 else cell.ljust(width)
