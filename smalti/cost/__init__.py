"""Cost: multiply-adds, parameters, seconds and bytes of any network, and whether a fast op may be timed at all."""

from smalti.cost.activations import ActivationBytes, count_activations
from smalti.cost.agreement import disagreement
from smalti.cost.clock import Gemm, Timing, clock_name, gemm_rate, measure, measure_interleaved
from smalti.cost.macs import MacCount, ParameterCount, count_macs, count_parameters
from smalti.cost.memory import PeakMemory, peak_memory, peak_memory_refusal
from smalti.cost.trial import on_meta

__all__ = [
    "ActivationBytes",
    "Gemm",
    "MacCount",
    "ParameterCount",
    "PeakMemory",
    "Timing",
    "clock_name",
    "count_activations",
    "count_macs",
    "count_parameters",
    "disagreement",
    "gemm_rate",
    "measure",
    "measure_interleaved",
    "on_meta",
    "peak_memory",
    "peak_memory_refusal",
]
