"""The definition. Sources: Su et al. 2021, arXiv:2104.09864, eq. 34; Liu et al. 2022, arXiv:2111.09883, sec. 3.3."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from smalti.ops.rotary.reference import rotary_reference


def cosine_heads_reference(
    qkv: Float[Tensor, "B N 3 H E"],
    cos: Float[Tensor, "N F"],
    sin: Float[Tensor, "N F"],
    lengths: Float[Tensor, "2 H"],
) -> Float[Tensor, "B 3 H N E"]:
    """Heads of cosine attention: queries and keys turned by the angle of their token, then given a length.

    Values are left as they are. Angles and lengths are worked out in at least float32.

    Args:
        cos, sin: of the angle of each pair of neighbouring channels, E = 2 F; as in `rotary`.
        lengths: of queries and of keys, one per head.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    turned = F.normalize(rotary_reference(qkv[:, :, :2].to(wide), cos, sin), dim=-1) * lengths.to(wide)[..., None]
    return torch.cat([turned.to(qkv.dtype), qkv[:, :, 2:]], dim=2).permute(0, 2, 3, 1, 4)
