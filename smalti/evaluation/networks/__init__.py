"""NETWORKS: the feature networks that can be asked for by name. A new network is one file and one line here."""

from collections.abc import Callable

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.evaluation.features import FeatureNetwork

# name -> builder, which takes what stands behind the name ("" or a size, a path) and the device. Builders import their
# module themselves: some of them need packages that are not always there.
Builder = Callable[[str, str], FeatureNetwork]


def _inception(rest: str, device: str) -> FeatureNetwork:
    from smalti.evaluation.networks.inception import build_inception

    return build_inception(rest, device)


def _lite0(rest: str, device: str) -> FeatureNetwork:
    from smalti.evaluation.networks.lite0 import build_lite0

    return build_lite0(rest, device)


def _dinov2(rest: str, device: str) -> FeatureNetwork:
    from smalti.evaluation.networks.dinov2 import build_dinov2

    return build_dinov2(rest, device)


NETWORKS: dict[str, Builder] = {
    "inception": _inception,
    "lite0": _lite0,
    "dinov2": _dinov2,
}


def build_network(spec: str, *, device: str = "cpu") -> FeatureNetwork:
    """The feature network that `NAME`, `NAME@SIZE` or `NAME:PATH` names.

    Raises:
        ConfigError: there is no such network, or a package that it needs is not installed.
        CheckpointError: its weights are missing, damaged, or not the ones they should be.
    """
    cut = min((i for i in (spec.find("@"), spec.find(":")) if i >= 0), default=len(spec))
    name, rest = spec[:cut], spec[cut:]
    if name not in NETWORKS:
        raise ConfigError(
            f"there is no feature network {name!r}{did_you_mean(name, NETWORKS)}; there are {', '.join(NETWORKS)}"
        )
    return NETWORKS[name](rest, device)
