"""How good images are: features of them, statistics of the features, and the numbers that papers print."""

from smalti.evaluation.features import FeatureNetwork, FeatureSet, NetworkIdentity, extract
from smalti.evaluation.floors import Floor, clean_floor
from smalti.evaluation.metric import Estimate, Metric, Values, measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.moments import Moments
from smalti.evaluation.networks import NETWORKS, build_network
from smalti.evaluation.networks.module import ModuleNetwork

__all__ = [
    "METRICS",
    "NETWORKS",
    "Estimate",
    "FeatureNetwork",
    "FeatureSet",
    "Floor",
    "Metric",
    "ModuleNetwork",
    "Moments",
    "NetworkIdentity",
    "Values",
    "build_network",
    "clean_floor",
    "extract",
    "measure",
]
