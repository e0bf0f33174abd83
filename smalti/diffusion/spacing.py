"""Which levels of a chain a sampler visits. All return indices that rise from the clean end.

respaced   equal strides from the first to the last level: the papers' 250 steps; "10,10,10" splits the chain into
           equal sections with so many steps each
ddim       an integer stride from level 0; only counts for which there is one
uniform    equal strides down from the noisiest level, which it meets for any count, even 1
log_snr    as even in log-SNR as the chain allows, which suits DPM-Solver++ at few steps
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.config import did_you_mean
from smalti.errors import ConfigError


def spaced_indices(log_snr: Float[Tensor, "T"], count: int, spacing: str) -> list[int]:
    """`count` indices of a chain whose levels have the given log-SNR.

    Args:
        log_snr: falls with the index.
        spacing: a name of `SPACINGS`, "default" (respaced), or sections as "10,10,10", clean end first.

    Raises:
        ConfigError: no such spacing, or not for so many steps.
    """
    if "," in spacing:
        sections = _read_sections(spacing)
        if sum(sections) != count:
            raise ConfigError(f"spacing {spacing!r} makes {sum(sections)} steps, but num_inference_steps is {count}")
        return respaced_indices(len(log_snr), sections)
    name = "respaced" if spacing == "default" else spacing
    if name not in SPACINGS:
        raise ConfigError(f"a chain of discrete steps has no spacing {spacing!r}{did_you_mean(spacing, SPACINGS)}")
    return SPACINGS[name](log_snr, count)


def uniform_indices(num_train_timesteps: int, count: int) -> list[int]:
    """`count` indices at equal strides, the noisiest among them."""
    return [round((i + 1) * num_train_timesteps / count) - 1 for i in range(count)]


def log_snr_indices(log_snr: Float[Tensor, "T"], count: int) -> list[int]:
    """`count` indices as close as the chain has them to equal steps in log-SNR, with both its ends.

    Source: Lu et al. 2022, arXiv:2206.00927 (there "uniform logSNR").
    """
    if count == 1:
        return [len(log_snr) - 1]
    wanted = torch.linspace(float(log_snr[0]), float(log_snr[-1]), count, dtype=torch.float64)
    nearest = (log_snr[None] - wanted[:, None]).abs().argmin(dim=1).tolist()
    indices: list[int] = []
    for place, index in enumerate(nearest):
        # Near the clean end the chain is coarser than the wish: take the next free level.
        lowest = indices[-1] + 1 if indices else 0
        indices.append(min(max(index, lowest), len(log_snr) - (count - place)))
    return indices


def respaced_indices(num_train_timesteps: int, sections: Sequence[int]) -> list[int]:
    """Choose levels by equal strides within equal sections of the chain; each section keeps both its ends.

    Args:
        sections: steps to take from each section, clean end first; one entry spaces the whole chain.

    Raises:
        ConfigError: a section is asked for more levels than it has.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, sec. 4.
    """
    size, longer = divmod(num_train_timesteps, len(sections))
    indices, start = [], 0
    for section, count in enumerate(sections):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise ConfigError(f"a section of {length} levels cannot give {count} steps; use 1 to {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # PARITY: respacing-rounding. The place is summed up step by step, and halves round to even.
        place = 0.0
        for _ in range(count):
            indices.append(start + round(place))
            place += stride
        start += length
    return indices


def strided_indices(num_train_timesteps: int, count: int) -> list[int]:
    """`count` levels at an integer stride from level 0.

    Raises:
        ConfigError: no integer stride visits exactly that many levels.

    Source: Song et al. 2021, arXiv:2010.02502, appendix D.3.
    """
    for stride in range(1, num_train_timesteps + 1):
        indices = range(0, num_train_timesteps, stride)
        if len(indices) == count:
            return list(indices)
    raise ConfigError(
        f"no integer stride takes {count} steps over {num_train_timesteps} levels; use spacing 'respaced' or 'uniform'"
    )


def _read_sections(spacing: str) -> list[int]:
    try:
        return [int(part) for part in spacing.split(",")]
    except ValueError:
        raise ConfigError(f"spacing {spacing!r} is not a list of step counts, for example '10,10,10'") from None


SPACINGS: dict[str, Callable[[Tensor, int], list[int]]] = {
    "respaced": lambda log_snr, count: respaced_indices(len(log_snr), [count]),
    "ddim": lambda log_snr, count: strided_indices(len(log_snr), count),
    "uniform": lambda log_snr, count: uniform_indices(len(log_snr), count),
    "log_snr": log_snr_indices,
}
