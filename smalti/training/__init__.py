"""Training: one loop, its state, and what a run is measured by."""

from smalti.training.config import DataConfig, OptimizerConfig, QualityConfig, RunConfig
from smalti.training.ema import EMA, default_decay
from smalti.training.loop import StepReport, train_steps
from smalti.training.state import TrainState

__all__ = [
    "EMA",
    "DataConfig",
    "OptimizerConfig",
    "QualityConfig",
    "RunConfig",
    "StepReport",
    "TrainState",
    "default_decay",
    "train_steps",
]
