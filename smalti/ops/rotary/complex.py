"""Twin that multiplies complex numbers: one pass over the tokens, where real arithmetic takes seven."""

import torch
from torch import Tensor


def rotary_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotary_reference`, each pair of channels read as one complex number."""
    turn = torch.complex(cos.to(x.dtype), sin.to(x.dtype)).view(cos.shape[0], *[1] * (x.ndim - 3), cos.shape[1])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
