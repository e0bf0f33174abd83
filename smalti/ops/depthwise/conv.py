"""Twin on PyTorch's convolution: tokens laid out on their grid are channels-last, its fastest layout."""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `depthwise_reference`, without a copy."""
    if x.device.type != "cpu":
        return _conv(x, weight, bias)
    # On a CPU the backward in half precision takes three times as long as that in float32, also under autocast.
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    wide = torch.promote_types(x.dtype, torch.float32) if training else x.dtype
    with torch.autocast("cpu", enabled=False):
        return _conv(x.to(wide), weight.to(wide), bias.to(wide)).to(x.dtype)


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    maps = x.permute(0, 3, 1, 2)
    return F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0]).permute(0, 2, 3, 1)
