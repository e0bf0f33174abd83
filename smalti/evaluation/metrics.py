"""METRICS: every number that smalti can put on a set of images. A new metric is one file and one line here."""

from smalti.evaluation.metric import Metric

METRICS: dict[str, Metric] = {}
