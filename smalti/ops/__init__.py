"""Ops: pure tensor functions. Each has a reference, which is the definition, and fast twins tested against it."""

from smalti.ops.adaln import adaln, fold_affine
from smalti.ops.attention import attention
from smalti.ops.bi_wkv import bi_wkv, bi_wkv_release
from smalti.ops.cosine_heads import cosine_heads
from smalti.ops.depthwise import depthwise
from smalti.ops.dispatch import Op, force
from smalti.ops.gated_add import gated_add
from smalti.ops.gelu import gelu
from smalti.ops.gelu_product import gelu_product
from smalti.ops.quad_shift import quad_shift
from smalti.ops.rotary import rotary
from smalti.ops.s4d import s4d, s4d_kernel, two_way_conv
from smalti.ops.shift_mix import shift_mix
from smalti.ops.sigmoid_gate import sigmoid_gate
from smalti.ops.squared_relu import squared_relu

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        adaln,
        attention,
        bi_wkv,
        bi_wkv_release,
        cosine_heads,
        depthwise,
        gated_add,
        gelu,
        gelu_product,
        quad_shift,
        rotary,
        s4d,
        s4d_kernel,
        shift_mix,
        sigmoid_gate,
        squared_relu,
        two_way_conv,
    )
}

__all__ = [
    "OPS",
    "Op",
    "adaln",
    "attention",
    "bi_wkv",
    "bi_wkv_release",
    "cosine_heads",
    "depthwise",
    "fold_affine",
    "force",
    "gated_add",
    "gelu",
    "gelu_product",
    "quad_shift",
    "rotary",
    "s4d",
    "s4d_kernel",
    "shift_mix",
    "sigmoid_gate",
    "squared_relu",
    "two_way_conv",
]
