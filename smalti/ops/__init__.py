"""Ops: pure tensor functions. Each has a reference, which is the definition, and fast twins tested against it."""

from smalti.ops.attention import attention
from smalti.ops.bi_wkv import bi_wkv, bi_wkv_release
from smalti.ops.depthwise import depthwise
from smalti.ops.dispatch import Op, force
from smalti.ops.quad_shift import quad_shift
from smalti.ops.rotary import rotary
from smalti.ops.s4d import s4d, s4d_kernel, two_way_conv

OPS: dict[str, Op] = {
    op.name: op
    for op in (attention, bi_wkv, bi_wkv_release, depthwise, quad_shift, rotary, s4d, s4d_kernel, two_way_conv)
}

__all__ = [
    "OPS",
    "Op",
    "attention",
    "bi_wkv",
    "bi_wkv_release",
    "depthwise",
    "force",
    "quad_shift",
    "rotary",
    "s4d",
    "s4d_kernel",
    "two_way_conv",
]
