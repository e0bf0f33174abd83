"""Label dropout: the unconditional half of classifier-free guidance is learned by hiding some labels.

It happens outside the networks, from numbers that the caller draws, so that a step is repeatable and `train()` changes
no formula.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smalti.errors import ConfigError


def drop_mask(uniforms: Float[Tensor, "B"], probability: float) -> Bool[Tensor, "B"]:
    """Which labels to hide: those whose number in [0, 1) is below `probability`.

    Raises:
        ConfigError: the probability is not in [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"label dropout must be between 0 and 1, got {probability}")
    return uniforms < probability


def drop_labels(class_labels: Int[Tensor, "B"], dropped: Bool[Tensor, "B"], null_class: int) -> Int[Tensor, "B"]:
    """Replace the labels at `dropped` by the null class (`num_classes`).

    Source: Ho & Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    return torch.where(dropped.to(class_labels.device), null_class, class_labels)
