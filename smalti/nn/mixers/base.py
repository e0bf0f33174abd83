"""The abstract mixer config: a field of this type is a choice between the entries of MIXERS."""

from dataclasses import dataclass
from typing import NamedTuple

from smalti.config import Kinds


class Place(NamedTuple):
    """Which layer of how many a mixer is, for those whose initial values depend on it."""

    layer: int
    depth: int


ALONE = Place(0, 1)


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Kinds):
    """How tokens see each other.

    The module of an entry is built as `Module(config, hidden_size, place)` and called as `(x: B N D, grid) -> B N D`.
    Tokens of in-context conditioning stand in front: the image tokens are the last `grid.tokens` of N. A mixer that
    needs the plane and has no use for other tokens refuses them with a ValueError.
    """

    @classmethod
    def kinds(cls) -> dict[str, type]:
        from smalti.nn.mixers import MIXERS  # here, because the table imports every member and each imports this file

        return {kind: config for kind, (config, _) in MIXERS.items()}
