"""The definition. Source: Vision-RWKV, arXiv:2403.02308, eq. 4 and 5; Diffusion-RWKV, arXiv:2404.04478, sec. 3.2."""

import torch
from jaxtyping import Float
from torch import Tensor


def bi_wkv_reference(
    decay: Float[Tensor, "C"], bonus: Float[Tensor, "C"], key: Float[Tensor, "B N C"], value: Float[Tensor, "B N C"]
) -> Float[Tensor, "B N C"]:
    """Mean of `value` over all tokens i, weighted exp(key_i - (|n - i| - 1) decay), and exp(key_n + bonus) for i = n.

    Args:
        decay: per token of distance, of either sign; already divided by N where the network asks for it.
        bonus: of the token itself; likewise.
    """
    n = torch.arange(key.shape[1], device=key.device)
    distance = (n[:, None] - n[None, :]).abs()[..., None]  # (N, N, 1)
    bias = torch.where(distance == 0, bonus, -(distance - 1) * decay)  # (N, N, C)
    weights = (bias + key[:, None]).softmax(dim=2)  # (B, N, N, C)
    return (weights * value[:, None]).sum(dim=2)
