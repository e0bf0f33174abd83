"""METRICS: every number that smalti can put on a set of images. A new metric is one file and one line here."""

from smalti.evaluation.extrapolation import FD_INFINITY, FID_INFINITY
from smalti.evaluation.frechet import FD, FD_PCA64, FID, SFID
from smalti.evaluation.inception_score import INCEPTION_SCORE
from smalti.evaluation.kid import KID
from smalti.evaluation.metric import Metric
from smalti.evaluation.precision_recall import COVERAGE, DENSITY, PRECISION, RECALL

METRICS: dict[str, Metric] = {
    "fid": FID,
    "sfid": SFID,
    "inception_score": INCEPTION_SCORE,
    "fid_infinity": FID_INFINITY,
    "fd": FD,
    "fd_pca64": FD_PCA64,
    "fd_infinity": FD_INFINITY,
    "kid": KID,
    "precision": PRECISION,
    "recall": RECALL,
    "density": DENSITY,
    "coverage": COVERAGE,
}
