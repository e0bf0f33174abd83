"""Twin on PyTorch's own functions, with the fastest rotation."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.ops.rotary import rotary


def cosine_heads_plain(
    qkv: Float[Tensor, "B N 3 H E"],
    cos: Float[Tensor, "N F"],
    sin: Float[Tensor, "N F"],
    lengths: Float[Tensor, "2 H"],
) -> Float[Tensor, "B 3 H N E"]:
    """As `cosine_heads_reference`."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    turned = F.normalize(rotary(qkv[:, :, :2].to(wide), cos, sin), dim=-1) * lengths.to(wide)[..., None]
    return torch.cat([turned.to(qkv.dtype), qkv[:, :, 2:]], dim=2).permute(0, 2, 3, 1, 4)
