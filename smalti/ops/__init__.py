"""Ops: pure tensor functions. Each has a reference, which is the definition, and fast twins tested against it."""

from smalti.ops.attention import attention
from smalti.ops.dispatch import Op, force

OPS: dict[str, Op] = {op.name: op for op in (attention,)}

__all__ = ["OPS", "Op", "attention", "force"]
