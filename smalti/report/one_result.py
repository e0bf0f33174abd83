"""One result of an evaluation as text: its numbers, what to know before quoting them, and how they were made."""

from collections.abc import Sequence

from smalti.evaluation.metric import Estimate
from smalti.evaluation.protocol import SHOWN, UNKNOWN, Protocol, told
from smalti.evaluation.results import Number, Result
from smalti.report.quality import ARROWS, CLEAN, aligned, floor_text, half_width, with_error, wrapped


def render_result(result: Result) -> str:
    """One result as text: its numbers, what to know before quoting them, and how they were made."""
    lines = [_headline(result), *(f"  {line}" for line in _number_lines(result.numbers))]
    cautions: dict[str, list[str]] = {}
    for number in result.numbers:
        if number.estimate.caution:
            cautions.setdefault(number.estimate.caution, []).append(number.label)
    for caution, labels in cautions.items():
        lines += wrapped(f"{', '.join(labels)}: {caution}", "  ")
    if result.memorisation and (sentence := result.memorisation.get("sentence")):
        lines += wrapped(sentence, "  ")
    return "\n".join([*lines, *_protocol_lines(result.protocol)])


def render_origins(results: Sequence[Result]) -> str:
    """Several results without their numbers: what was measured, and each way that it was measured once."""
    alike: dict[str, list[Result]] = {}
    for result in results:
        alike.setdefault(result.protocol.digest, []).append(result)
    return "\n".join(
        line
        for group in alike.values()
        for line in (*(_headline(result) for result in group), *_protocol_lines(group[0].protocol))
    )


def _headline(result: Result) -> str:
    name, path = result.source.name, result.source.path
    return name if name == path else f"{name} ({path})"


def _number_lines(numbers: Sequence[Number]) -> list[str]:
    shown = [with_error(n.estimate.value, half_width(n.estimate)) for n in numbers]
    intervals = [
        _interval(n.estimate, value if reach else "") for n, (value, reach) in zip(numbers, shown, strict=True)
    ]
    floors = [floor_text(n.floor, [n]).split(" ") if n.floor else ("", "") for n in numbers]
    columns = {
        "": [f"{n.label} {ARROWS[n.better]}" for n in numbers],
        "value": _meeting(shown, " ± "),
        "95 % interval": [text or "unknown" for text in _meeting(intervals, " to ")],
        CLEAN: _meeting(floors, " "),
    }
    filled = {head: cells for head, cells in columns.items() if any(cells)}
    return aligned([list(filled), *map(list, zip(*filled.values(), strict=True))], numeric=())


def _interval(estimate: Estimate, like: str) -> tuple[str, str]:
    """Both ends with the decimals of a shown value."""
    if not like or estimate.low is None or estimate.high is None:
        return "", ""
    decimals = len(like.partition(".")[2])
    return f"{estimate.low:z.{decimals}f}", f"{estimate.high:z.{decimals}f}"


def _meeting(pairs: Sequence[Sequence[str]], sign: str) -> list[str]:
    """Two columns as one: the left ones end and the right ones begin below each other, with a sign between."""
    width = max((len(left) for left, _ in pairs), default=0)
    return [f"{left:>{width}}{sign if right else ''}{right}" if left else "" for left, right in pairs]


def _protocol_lines(p: Protocol) -> list[str]:
    count = f"{p.count:,}" if p.count is not None else UNKNOWN
    size = " x ".join(map(str, p.image_size)) if p.image_size else UNKNOWN
    weights = {True: "averaged", False: "not averaged", None: UNKNOWN}[p.ema]
    drawn = (
        f"class labels {told(p.class_labels)}, weights {weights}, precision {told(p.precision)}, "
        f"inference {told(p.inference)}, decoder {told(p.decoder)}"
    )
    parts = {"images": f"{count} of {size}, {'real images of a data set' if p.real else drawn}"}
    if not p.real:
        parts["sampling"] = ", ".join(f"{k} {told(v)}" for k, v in p.sampling.items()) if p.sampling else UNKNOWN
    net = p.network
    parts["features"] = f"{net.name} {net.weights[:SHOWN]} ({net.resize}; {net.numerics})" if net else UNKNOWN
    if any(rule.uses_reference for rule in p.metrics):
        ref = p.reference
        images = f"{ref.count:,} images" if ref and ref.count is not None else "number of images unknown"
        parts["reference"] = f"{ref.name} {ref.digest[:SHOWN]} ({images})" if ref else UNKNOWN
    lines = [f"  protocol {p.digest[:SHOWN]}, smalti {told(p.smalti)}"]
    for name, text in parts.items():
        lines += wrapped(f"{name}: {text}", "    ")
    return lines
