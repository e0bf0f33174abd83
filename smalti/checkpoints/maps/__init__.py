"""One file per source of released weights: which of its names is which of ours."""

from smalti.checkpoints.maps.base import Source
from smalti.checkpoints.maps.dit import DIT
from smalti.checkpoints.maps.drwkv import DRWKV
from smalti.checkpoints.maps.s4 import S4, S4D
from smalti.checkpoints.maps.udit import UDIT

MAPS: dict[str, Source] = {
    DIT.name: DIT,
    DRWKV.name: DRWKV,
    UDIT.name: UDIT,
}

# Layers that were released by themselves: they become mixers.
LAYERS: dict[str, Source] = {
    S4.name: S4,
    S4D.name: S4D,
}

__all__ = ["LAYERS", "MAPS", "Source"]
