"""What the kernel released with Diffusion-RWKV computes, for its checkpoints: not quite the published mean.

Source: feizc/Diffusion-RWKV at d1b43f2, whose kernel is that of OpenGVLab/Vision-RWKV; described by its weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Numbers in the largest table, (B, N, N, channels at a time).
_TABLE = 2**24


def bi_wkv_release(
    decay: Float[Tensor, "C"], bonus: Float[Tensor, "C"], key: Float[Tensor, "B N C"], value: Float[Tensor, "B N C"]
) -> Float[Tensor, "B N C"]:
    """As `bi_wkv_reference`, but with the weights and the denominator of the released kernel.

    Tokens are cut into 32 pieces of equal length (the last ones may be shorter or empty). A decay acts once more than
    published on every later token and on those before the own piece. The whole N x N table of weights is made, for a
    few channels at a time.

    Args:
        decay: per token of distance, of either sign; already divided by N where the network asks for it.
        bonus: of the token itself; likewise.
    """
    batch, tokens, channels = key.shape
    width = max(1, _TABLE // max(1, batch * tokens * tokens))
    parts = [
        _some_channels(decay[c : c + width], bonus[c : c + width], key[..., c : c + width], value[..., c : c + width])
        for c in range(0, channels, width)
    ]
    return torch.cat(parts, dim=-1)


def _some_channels(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    tokens = key.shape[1]
    i = torch.arange(tokens, device=key.device)
    n = i[:, None]
    piece = -(-tokens // 32)
    start = n // piece * piece  # of the piece that token n is in
    near_past, removed = (start <= i) & (i < n), (start < i) & (i <= n)

    # PARITY: release-distance. Published: |n - i| - 1 everywhere. The kernel subtracts the 1 within the piece only.
    distance = torch.where(near_past, n - i - 1, (n - i).abs())[..., None].to(key.dtype)  # (N, N, 1)
    bias = torch.where((i == n)[..., None], bonus, -distance * decay)  # (N, N, C)
    exponent = bias + key[:, None]  # (B, N, N, C)

    # PARITY: release-remainder. As n passes token i, the kernel takes e^(key + decay) out of a sum that holds e^key;
    # what stays behind grows by e^decay with every further token of the piece.
    behind = torch.where(removed, n - i, 0)[..., None] * decay + key[:, None]

    # The largest exponent that the kernel meets on its way to n, in sums as well as in what it takes out of them.
    gone = torch.where(removed[..., None], behind + decay.clamp(min=0), -torch.inf)
    first = torch.where((i == start)[..., None], (n - i)[..., None] * decay + key[:, None], -torch.inf)
    largest = torch.maximum(torch.maximum(exponent, gone), first).amax(2, keepdim=True).detach()

    remainder = torch.where(removed[..., None], -torch.expm1(decay) * (behind - largest).exp(), 0)
    weights = (exponent - largest).exp() + remainder
    # PARITY: release-epsilon. Added to the denominator relative to that largest exponent.
    return (weights * value[:, None]).sum(dim=2) / (weights.sum(dim=2) + 1e-6)
