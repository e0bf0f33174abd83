"""One file per source of released weights: which of its names is which of ours."""

from smalti.checkpoints.maps.base import Source
from smalti.checkpoints.maps.dit import DIT

MAPS: dict[str, Source] = {
    DIT.name: DIT,
}

__all__ = ["MAPS", "Source"]
