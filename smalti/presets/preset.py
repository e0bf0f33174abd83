"""A row of a preset table."""

from dataclasses import dataclass

from smalti.models import BackboneConfig


@dataclass(frozen=True)
class Published:
    """What the source prints, in its own rounding; None where it is silent.

    Args:
        parameters_m: millions of parameters.
        gmacs: multiply-adds of one forward, in 10^9; the papers call it Gflops.
        total: parameters counted on the released classes, the fixed position table included.
        fused_total: the same after `fuse()`; where it stands, the source's millions and GMACs are of that form, too.
    """

    parameters_m: float | None = None
    gmacs: float | None = None
    total: int | None = None
    fused_total: int | None = None


@dataclass(frozen=True)
class Preset:
    """A named network.

    Args:
        title: the source's own spelling.
        source: paper and table, or "ours" and what it is for.
    """

    name: str
    title: str
    config: BackboneConfig
    source: str
    published: Published = Published()
