"""The definition. Source: Vision-RWKV, arXiv:2403.02308, sec. 3.2 (the gate sigma(R))."""

from jaxtyping import Float
from torch import Tensor


def sigmoid_gate_reference(gate: Float[Tensor, "*S"], x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """x times sigmoid(gate), number by number."""
    return gate.sigmoid() * x
