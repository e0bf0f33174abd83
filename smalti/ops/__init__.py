"""Ops: pure tensor functions. Each has a reference, which is the definition, and fast twins tested against it."""

from smalti.ops.attention import attention
from smalti.ops.bi_wkv import bi_wkv
from smalti.ops.dispatch import Op, force

OPS: dict[str, Op] = {op.name: op for op in (attention, bi_wkv)}

__all__ = ["OPS", "Op", "attention", "bi_wkv", "force"]
