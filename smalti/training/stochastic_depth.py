"""Stochastic depth: some images skip some residual branches in training, the deeper the more often.

It acts from outside, on the branches that each block names, so that networks hold no randomness and any backbone can be
trained with it. Diffusion-RWKV's released training runs with a rate of 0.1.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smalti import streams


@contextmanager
def stochastic_depth(model: nn.Module, rate: float, seed: int, positions: Sequence[int]) -> Iterator[None]:
    """While it lasts, every branch of block i of L is left out with probability rate * i / L, for each image alone.

    What is kept is divided by the probability of being kept, so that its mean stays. Both branches of a block have a
    fate of their own.

    Args:
        rate: that of the block behind the last, 0 = nothing happens. All blocks before it share it out evenly.
        positions: of the images in the run; fates are a function of seed, position, block and branch.

    Source: Huang et al. 2016, arXiv:1603.09382, sec. 3; the linear rule as released for arXiv:2404.04478.
    """
    with ExitStack() as hooks:
        blocks: list[nn.Module] = list(model.iter_blocks()) if rate else []  # type: ignore[operator]
        for i, block in enumerate(blocks):
            dropped = rate * i / len(blocks)
            for j, branch in enumerate(block.branches() if dropped else ()):  # type: ignore[operator]
                uniforms = [streams.uniform(seed, streams.DEPTH, position, i, j) for position in positions]
                factors = torch.tensor([0.0 if u < dropped else 1 / (1 - dropped) for u in uniforms])
                hooks.callback(_scale(branch, factors).remove)
        yield


def _scale(branch: nn.Module, factors: Tensor) -> RemovableHandle:
    def scale(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output * factors.to(output).view(-1, *[1] * (output.ndim - 1))

    return branch.register_forward_hook(scale)
