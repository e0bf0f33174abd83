"""Two rows of a comparison: how far apart they are in one column, and how sure that is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from smalti.evaluation.metric import Estimate
from smalti.report.quality import with_error


@dataclass(frozen=True)
class Pair:
    """How far apart two rows are in one column; `gap` is None where one of them has no error.

    Attributes:
        better: of the two, the name of the better one; "" where the gap is within its uncertainty or unknown.
    """

    label: str
    first: str
    second: str
    gap: Estimate | None
    better: str

    @property
    def rule(self) -> Literal["groups", "independent", ""]:
        """Where the error comes from: the gap without each group of images in turn, or both errors, added."""
        return "" if self.gap is None else "groups" if self.gap.without else "independent"


def sentence(pair: Pair) -> str:
    """The pair in words, as: FID: a is better than b by 2.0 ± 1.1."""
    if pair.gap is None or pair.gap.high is None:
        return f"{pair.label}: {pair.first} and {pair.second} cannot be told apart without errors of both."
    value, reach = with_error(abs(pair.gap.value), pair.gap.high - pair.gap.value)
    if pair.better:
        return f"{pair.label}: {pair.first} is better than {pair.second} by {value} ± {reach}."
    return f"{pair.label}: {pair.first} and {pair.second} differ by {value} ± {reach}, which is within the uncertainty."


def how_found(pairs: Sequence[Pair], common_reference: bool) -> Iterator[str]:
    """What to know of the errors of these gaps."""
    rules = [pair.rule for pair in pairs if pair.rule]
    if "groups" in rules:
        yield (
            "The error of a difference is found from the difference itself, without each tenth of both rows in turn: "
            "what rows of the same seeds share, noise and labels, cancels."
        )
    if "independent" in rules:
        where = " where their counts differ, or a file has no values without each tenth" if "groups" in rules else ""
        yield f"A difference adds the errors of both rows as independent{where}."
    if rules and common_reference:
        yield "The reference is common to all rows: what its choice of images adds is in no error."
