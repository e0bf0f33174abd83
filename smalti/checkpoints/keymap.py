"""Foreign tensor names to ours and back. A model never bends to a checkpoint; a map does."""

import re
from collections.abc import Collection, Iterable, Mapping

_LEAF = r"(?P<leaf>(?:\.weight|\.bias)?)"


class KeyMap:
    """Rules `{their prefix: our prefix}`; `{}` stands for a block number, and `.weight` and `.bias` follow the prefix.

    Only names change: where shapes or orders differ between two codes, ours follows the released one.

    Args:
        optional: rules, by their prefix, for parts that some released networks have and others have not.
    """

    def __init__(self, rules: Mapping[str, str], optional: Collection[str] = ()) -> None:
        self.rules, self.optional = dict(rules), frozenset(optional)
        if unknown := self.optional - set(rules):
            raise ValueError(f"{sorted(unknown)} are optional, but no rules")

    def to_ours(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """Their names with ours, and those that no rule knows.

        Raises:
            ValueError: two rules claim one name, or two names become one; the map is wrong.
        """
        return _rename(self.rules, names)

    def to_theirs(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """Our names with theirs, and those that no rule knows.

        Raises:
            ValueError: as `to_ours`.
        """
        return _rename({ours: theirs for theirs, ours in self.rules.items()}, names)

    def idle(self, names: Iterable[str]) -> list[str]:
        """Rules, but for the optional ones, that meet none of their names."""
        names = list(names)
        needed = {rule: _pattern(rule) for rule in self.rules if rule not in self.optional}
        return [rule for rule, pattern in needed.items() if not any(map(pattern.fullmatch, names))]


def _rename(rules: Mapping[str, str], names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    patterns = {source: _pattern(source) for source in rules}
    renamed: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        hits = [(source, match) for source, pattern in patterns.items() if (match := pattern.fullmatch(name))]
        if len(hits) > 1:
            raise ValueError(f"{name!r} is claimed by the rules {[source for source, _ in hits]}")
        if not hits:
            unknown.append(name)
            continue
        source, match = hits[0]
        numbers = match.groups()[:-1]  # the leaf is the last group
        renamed[name] = rules[source].format(*numbers) + match["leaf"]
    if len(set(renamed.values())) < len(renamed):
        raise ValueError(f"two of these names become one: {sorted(renamed)}")
    return renamed, unknown


def _pattern(prefix: str) -> re.Pattern[str]:
    # `0` or a number without leading zeros, so that renaming there and back gives the same name.
    return re.compile(re.escape(prefix).replace(r"\{\}", r"(0|[1-9]\d*)") + _LEAF)
