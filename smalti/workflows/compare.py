"""`compare`: results side by side, where their protocols agree; and what papers print, apart from them."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smalti.config import did_you_mean, to_dict
from smalti.errors import ConfigError, DataError
from smalti.evaluation.protocol import UNKNOWN, Difference, check_allowed, unequal
from smalti.evaluation.results import FloorValue, Number, Result, difference, read_result
from smalti.presets.published import PublishedResult, published
from smalti.report.files import write_text
from smalti.report.quality import (
    CLEAN,
    CleanRow,
    Column,
    QualityTable,
    Row,
    as_markdown,
    as_text,
    quality_page,
)
from smalti.workflows.compare_pairs import Pair, how_found, sentence
from smalti.workflows.compare_published import quoted_labels, quoted_notes, quoted_row

ENDINGS = (".md", ".html", ".json", ".txt")
_FOLDER = "evaluation"  # of a run, for its results
_ALL_PAIRS = 3  # rows up to which every pair gets a sentence
_SPELLED = 2  # differences that a refusal tells with their values

_Refused = tuple[str, Difference, tuple[str, str]]  # column label, what differs, names of both rows


@dataclass(frozen=True)
class Entry:
    """A result with the file that it came from, and its name in the table."""

    name: str
    path: Path
    result: Result


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        waived: (column label, difference, files) for every part that was allowed to differ.
    """

    entries: tuple[Entry, ...]
    table: QualityTable
    pairs: tuple[Pair, ...]
    waived: tuple[tuple[str, Difference, tuple[str, str]], ...]
    quoted: tuple[PublishedResult, ...]


def compare(
    paths: Sequence[Path],
    *,
    published_of: Sequence[str] = (),
    allow: Sequence[str] = (),
    sort: str = "",
    names: Sequence[str] = (),
) -> Comparison:
    """Put results into one table, a row each, and a column for every number.

    Args:
        paths: result files, or folders: of runs (their `evaluation` is read), or of results.
        published_of: presets or families whose published numbers are shown below, apart.
        allow: parts of the protocol that may differ; "unknown" = whatever is not known.
        sort: metric or label whose order the rows take; "" = the first.
        names: of the rows, one for each path, which then are files; empty = those of the sources.

    Raises:
        ConfigError: two results differ in what bears on a number that both have, and nothing allows it.
        DataError: a path holds no result.
        CheckpointError: a result is damaged.
    """
    check_allowed(allow)
    read = [(path, read_result(path)) for path in _files(paths)]
    entries = tuple(Entry(n, *found) for n, found in zip(names, read, strict=True)) if names else _named(read)
    quoted = tuple(dict.fromkeys(row for name in published_of for row in published(name)))
    labels = dict.fromkeys(number.label for entry in entries for number in entry.result.numbers)
    waived = tuple(_waived(entries, labels, allow))
    first = _sort_label(sort, entries, labels)
    entries = tuple(sorted(entries, key=lambda entry: _rank(entry, first)))
    pairs = tuple(itertools.chain.from_iterable(_pairs(entries, label) for label in labels))
    table = QualityTable(
        columns=[_column(entries, label) for label in labels],
        rows=[Row(entry.name, _by_label(entry)) for entry in entries],
        clean=_clean_rows(entries),
        statements=list(_statements(entries, pairs, labels)),
        notes=[*_of_real(entries), *_cautions(entries), *_footnotes(entries, waived)],
        quoted_labels=quoted_labels(quoted),
        quoted=[quoted_row(row) for row in quoted],
        quoted_notes=list(quoted_notes(quoted)),
    )
    return Comparison(entries, table, pairs, waived, quoted)


def check_out(path: Path) -> None:
    """Refuse an ending that nothing is written as.

    Raises:
        ConfigError: another than `ENDINGS`.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--out {path}: a comparison is written as {', '.join(ENDINGS)}")


def write_comparison(comparison: Comparison, path: Path) -> None:
    """As the ending of `path` says.

    Raises:
        ConfigError: another ending than `ENDINGS`.
        StorageError: the disk is full or refuses.
    """
    check_out(path)
    table, ending = comparison.table, path.suffix.lower()
    if ending == ".json":
        text = as_json(comparison)
    elif ending == ".md":
        text = as_markdown(table)
    else:
        text = quality_page(table, "Image quality") if ending == ".html" else as_text(table) + "\n"
    write_text(path, text)


def as_json(comparison: Comparison) -> str:
    """One JSON object with everything that the table says, all pairs included, and the whole results."""
    table = comparison.table
    document: dict[str, Any] = {
        "columns": [dataclasses.asdict(column) for column in table.columns],
        "rows": [
            {
                "name": entry.name,
                "file": str(entry.path),
                "protocol_digest": entry.result.protocol.digest,
                "column_digests": {n.label: _column_digest(entry, n) for n in entry.result.numbers},
                "result": to_dict(entry.result),
            }
            for entry in comparison.entries
        ],
        "clean": [
            {"name": row.name, "floors": {label: dataclasses.asdict(f) for label, f in row.floors.items()}}
            for row in table.clean
        ],
        "pairs": [dataclasses.asdict(pair) | {"rule": pair.rule} for pair in comparison.pairs],
        "waived": [
            {"label": label, "part": d.name, "values": [d.here, d.there], "files": list(files)}
            for label, d, files in comparison.waived
        ],
        "notes": list(table.notes),
        "published": [dataclasses.asdict(row) | {"stated": row.stated()} for row in comparison.quoted],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _files(paths: Sequence[Path]) -> list[Path]:
    if not paths:
        raise ConfigError("name at least one result: a file that `smalti evaluate` wrote, or the folder of a run")
    found: dict[Path, Path] = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            folder = path / _FOLDER if (path / _FOLDER).is_dir() else path
            inside = sorted(folder.glob("*.json"))
            if not inside:
                raise DataError(f"{folder} holds no result (*.json); `smalti evaluate` writes them")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _named(results: Sequence[tuple[Path, Result]]) -> tuple[Entry, ...]:
    """Names as short as they can be told apart: the source's, then with the file's, then the path."""
    spellings = [
        [result.source.name for _, result in results],
        [f"{result.source.name} ({path.stem})" for path, result in results],
        [str(path) for path, _ in results],
    ]
    names = [next(s[i] for s in spellings if s.count(s[i]) == 1) for i in range(len(results))]
    return tuple(Entry(name, path, result) for name, (path, result) in zip(names, results, strict=True))


def _by_label(entry: Entry) -> dict[str, Number]:
    return {number.label: number for number in entry.result.numbers}


def _holders(entries: Iterable[Entry], label: str) -> list[tuple[Entry, Number]]:
    return [(entry, number) for entry in entries if (number := _by_label(entry).get(label)) is not None]


def _column_digest(entry: Entry, number: Number) -> str:
    return entry.result.protocol.column_digest(number.metric)


def _waived(
    entries: Sequence[Entry], labels: Iterable[str], allow: Sequence[str]
) -> Iterator[tuple[str, Difference, tuple[str, str]]]:
    """Differences that are allowed; those that are not end it all, in one line.

    Every pair is looked at: next to an unknown part, two known ones that differ would both be waived as unknown.
    """
    refused: list[_Refused] = []
    for label in labels:
        for (one, number), (other, theirs) in itertools.combinations(_holders(entries, label), 2):
            if theirs.metric != number.metric:
                raise DataError(f"{one.path} and {other.path} call two metrics {label}; one of them is not of smalti")
            for found in unequal(one.result.protocol, other.result.protocol, number.metric):
                if found.allowed_by(allow):
                    yield label, found, (str(one.path), str(other.path))
                else:
                    refused.append((label, found, (one.name, other.name)))
    if refused:
        raise ConfigError(_refusal(refused, allow))


def _refusal(refused: Sequence[_Refused], allow: Sequence[str]) -> str:
    """What differs, and in whose rows; unknown parts by the rows that do not know them."""
    labels = ", ".join(dict.fromkeys(label for label, _, _ in refused))
    differ: dict[str, str] = {}
    unknown: dict[str, dict[str, None]] = {}  # part -> rows
    for _, found, rows in refused:
        without = [row for row, value in zip(rows, (found.here, found.there), strict=True) if value == UNKNOWN]
        if without:
            unknown.setdefault(found.name, {}).update(dict.fromkeys(without))
        else:
            differ.setdefault(found.name, found.between(*(f"in {row}" for row in rows)))
    alike: dict[tuple[str, ...], list[str]] = {}
    for part, known_not in unknown.items():
        alike.setdefault(tuple(known_not), []).append(part)
    said = list(differ.values())[:_SPELLED]
    if more := list(differ)[_SPELLED:]:
        said.append(f"and {len(more)} more: {', '.join(more)}")
    said += [f"{', '.join(parts)}: {UNKNOWN} in {', '.join(rows)}" for rows, parts in alike.items()]
    waive = ",".join(dict.fromkeys([*allow, *differ, *([UNKNOWN] if unknown else [])]))
    return (
        f"{labels} of these results cannot stand in one column: {'; '.join(said)}. Measure them alike, or say what may "
        f"differ, for a footnote: --allow {waive}"
    )


def _sort_label(sort: str, entries: Sequence[Entry], labels: Iterable[str]) -> str:
    labels = list(labels)
    if not labels:
        raise DataError("these results hold no numbers")
    metrics = {number.metric: number.label for entry in reversed(entries) for number in entry.result.numbers}
    known = {**{label.lower(): label for label in labels}, **metrics}
    if not sort:
        return labels[0]
    if sort.lower() not in known:
        raise ConfigError(f"--sort {sort}: no result has this number{did_you_mean(sort, [*metrics, *labels])}")
    return known[sort.lower()]


def _rank(entry: Entry, label: str) -> tuple[bool, float]:
    number = _by_label(entry).get(label)
    if number is None:
        return True, 0.0
    return False, number.estimate.value if number.better == "lower" else -number.estimate.value


def _column(entries: Sequence[Entry], label: str) -> Column:
    holders = _holders(entries, label)
    better = holders[0][1].better
    drawn = [held for held in holders if not held[0].result.protocol.real]
    order = sorted(drawn, key=lambda held: _rank(held[0], label))
    best = ""
    if len(order) > 1 and all(_clear(order[0][1], number) for _, number in order[1:]):
        best = order[0][0].name
    return Column(label, holders[0][1].metric, better, best)


def _clear(best: Number, other: Number) -> bool:
    """The intervals do not meet."""
    a, b = best.estimate, other.estimate
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.high < b.low if best.better == "lower" else a.low > b.high


def _pairs(entries: Sequence[Entry], label: str) -> Iterator[Pair]:
    order = sorted(_holders(entries, label), key=lambda held: _rank(held[0], label))
    for (one, a), (other, b) in itertools.combinations(order, 2):
        counts = one.result.protocol.count, other.result.protocol.count
        gap = difference(a.estimate, b.estimate, same_groups=counts[0] is not None and counts[0] == counts[1])
        told_apart = gap is not None and gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
        yield Pair(label, one.name, other.name, gap, one.name if told_apart else "")


def _statements(entries: Sequence[Entry], pairs: Sequence[Pair], labels: Iterable[str]) -> Iterator[str]:
    common = False
    for label in labels:
        holders = _holders(entries, label)
        order = [entry.name for entry, _ in sorted(holders, key=lambda held: _rank(held[0], label))]
        neighbours = set(itertools.pairwise(order))
        for pair in pairs:
            if pair.label == label and (len(order) <= _ALL_PAIRS or (pair.first, pair.second) in neighbours):
                yield sentence(pair)
        if len(order) > 1:
            metric = holders[0][1].metric
            common |= any(r.uses_reference for r in holders[0][0].result.protocol.metrics if r.name == metric)
    yield from how_found(pairs, common)
    if len(entries) > _ALL_PAIRS:
        yield "Only neighbours in the order of each column are told here; all pairs are in the JSON."


def _clean_rows(entries: Sequence[Entry]) -> list[CleanRow]:
    """One row where all results have the same floors; more where they do not."""
    rows: list[tuple[str, dict[str, FloorValue]]] = []
    for entry in entries:
        floors = {n.label: n.floor for n in entry.result.numbers if n.floor is not None}
        for _, known in rows:
            if all(known.get(label, floor) == floor for label, floor in floors.items()):
                known |= floors
                break
        else:
            if floors:
                rows.append((entry.name, dict(floors)))
    if len(rows) == 1:
        return [CleanRow(CLEAN, rows[0][1])]
    return [CleanRow(f"{CLEAN} beside {name}", floors) for name, floors in rows]


def _cautions(entries: Sequence[Entry]) -> Iterator[str]:
    """What to know before quoting, each once, with the rows and the columns that it is said of."""
    said: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        for number in entry.result.numbers:
            if number.estimate.caution:
                said.setdefault(number.estimate.caution, {}).setdefault(entry.name, []).append(number.label)
        if entry.result.memorisation and (sentence := entry.result.memorisation.get("sentence")):
            said.setdefault(sentence, {}).setdefault(entry.name, [])
    for what, rows in said.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for row, columns in rows.items():
            alike.setdefault(tuple(columns), []).append(row)
        for labels, names in alike.items():
            who = ["all rows"] if len(names) == len(entries) > 1 else names
            yield f"{', '.join([*who, *labels])}: {what}"


def _footnotes(entries: Sequence[Entry], waived: Iterable[tuple[str, Difference, tuple[str, str]]]) -> Iterator[str]:
    """What was allowed to differ, and what each row has: one for all parts that differ in the same columns."""
    names = {str(entry.path): entry.name for entry in entries}
    columns: dict[str, dict[str, None]] = {}
    values: dict[str, dict[str, str]] = {}
    for label, found, (here, there) in waived:
        columns.setdefault(found.name, {})[label] = None
        values.setdefault(found.name, {}).update({names[here]: found.here, names[there]: found.there})
    together: dict[tuple[str, ...], list[str]] = {}
    for part, labels in columns.items():
        rows: dict[str, list[str]] = {}
        for name, value in values[part].items():
            rows.setdefault(value, []).append(name)
        each = ", ".join(f"{value} ({', '.join(having)})" for value, having in rows.items())
        together.setdefault(tuple(labels), []).append(f"{part} is {each}")
    for where, parts in together.items():
        yield f"Not alike in {', '.join(where)}, as allowed: {'; '.join(parts)}."


def _of_real(entries: Sequence[Entry]) -> Iterator[str]:
    real = [entry.name for entry in entries if entry.result.protocol.real]
    if real and len(real) < len(entries):
        yield f"{', '.join(real)}: real images, which no model drew; the mark of the best leaves them out."
