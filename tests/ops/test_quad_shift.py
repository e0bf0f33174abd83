"""Quad shift: by hand, at the edges, and bit for bit as the released code moves the numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.ops import quad_shift

pytestmark = pytest.mark.usefixtures("deterministic")

DATA = Path(__file__).parents[1] / "data" / "parity"
CASES = json.loads((DATA / "index_drwkv.json").read_text())["files"]["q_shift.safetensors"]["cases"]
EACH = pytest.mark.parametrize("impl", ["reference", *quad_shift.fast])


@EACH
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_moved_as_by_the_released_code_bit_for_bit(impl, case):
    tensors, entry = load_file(DATA / "q_shift.safetensors"), CASES[case]
    x = tensors[f"{case}.input.x"].unflatten(1, (entry["H"], entry["W"]))
    y = quad_shift(x, impl=impl, shift=entry["shift_pixel"], fraction=entry["gamma"])
    assert torch.equal(y.flatten(1, 2), tensors[f"{case}.output.y"])


@EACH
def test_a_grid_of_two_by_two_worked_out_by_hand(impl):
    # Token r * 2 + c + 1 in every channel; the groups look left, right, up, down, and the fifth channel stays.
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None].expand(1, 2, 2, 5)
    left, right, up, down, own = quad_shift(x, impl=impl, fraction=0.2)[0].unbind(-1)
    assert left.tolist() == [[0, 1], [0, 3]]
    assert right.tolist() == [[2, 0], [4, 0]]
    assert up.tolist() == [[0, 0], [1, 2]]
    assert down.tolist() == [[3, 4], [0, 0]]
    assert own.tolist() == [[1, 2], [3, 4]]


@EACH
@pytest.mark.parametrize("shift", [0, 1, 3, 5, 9])
def test_a_neighbour_beyond_the_grid_is_zero_and_no_distance_is_no_change(impl, shift):
    x = 1 + torch.rand(2, 3, 5, 8)
    y = quad_shift(x, impl=impl, shift=shift)
    assert (y == 0).sum() == 2 * 2 * (min(shift, 5) * 3 * 2 + min(shift, 3) * 5 * 2)
    assert torch.equal(y, x) is (shift == 0)
    assert torch.equal(y, quad_shift(x, impl="reference", shift=shift))


@EACH
@pytest.mark.parametrize("shape", [(2, 1, 1, 4), (1, 1, 6, 9), (3, 7, 2, 3), (2, 4, 4, 16)])
@pytest.mark.parametrize("shift", [1, 2])
def test_the_gradient_goes_back_where_the_numbers_came_from(impl, shape, shift):
    x, above = torch.rand(shape, dtype=torch.float64, requires_grad=True), torch.rand(shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(quad_shift(x, impl=impl, shift=shift), x, above)
    # <above, S x> = <S^T above, x> for every x: each number arrives once or not at all, so the sums are exact twins.
    (expected,) = torch.autograd.grad(quad_shift(x, impl="reference", shift=shift), x, above)
    assert torch.equal(gradient, expected)
    assert torch.autograd.gradgradcheck(lambda t: quad_shift(t, impl=impl, shift=shift), x, fast_mode=True)


@EACH
def test_tokens_cut_out_of_a_longer_sequence_need_no_copy(impl):
    sequence = torch.randn(2, 14, 8)
    view = sequence[:, 2:].unflatten(1, (3, 4))
    assert torch.equal(quad_shift(view, impl=impl), quad_shift(view.clone(), impl="reference"))
