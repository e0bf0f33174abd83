"""Resizing as TensorFlow 1: its own numbers, the definition in float64, and what must not change anything."""

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.errors import DataError
from smalti.evaluation.networks.resize import resize_tf1

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "parity" / "resize_tf1.safetensors")
CASES = sorted({key.split(".")[0] for key in GOLDEN})


def definition(image, rows, columns):
    """One plane in float64, pixel by pixel."""
    height, width = image.shape
    result = torch.empty(rows, columns, dtype=torch.float64)
    for i, j in product(range(rows), range(columns)):
        y, x = i * height / rows, j * width / columns
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        above = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
        below = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
        result[i, j] = above * (1 - (y - top)) + below * (y - top)
    return result


@pytest.mark.parametrize("case", CASES)
def test_it_equals_tensorflow(case):
    images, expected = GOLDEN[f"{case}.input.image"], GOLDEN[f"{case}.output.resized"]
    found = resize_tf1(images.permute(0, 3, 1, 2), tuple(expected.shape[1:3]))
    torch.testing.assert_close(found.permute(0, 2, 3, 1), expected, rtol=0, atol=1e-3)


# Positions in float32 are wrong by up to their size times eps (the ratio's and the product's rounding); between two
# neighbouring pixels lie at most 255 levels.
@pytest.mark.parametrize(
    ("before", "after"), [((5, 7), (29, 31)), ((40, 17), (13, 40)), ((26, 46), (299, 23)), ((1, 1), (3, 2))]
)
def test_it_is_the_definition_but_for_positions_in_float32(before, after):
    image = torch.randint(0, 256, before, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = resize_tf1(image.expand(2, 3, -1, -1), after)
    expected = definition(image.double(), *after)
    position = 255 * 2 * sum(before) * torch.finfo(torch.float32).eps
    products = 255 * 8 * torch.finfo(torch.float32).eps
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= position + products


def test_floats_keep_their_range_and_equal_sizes_keep_every_value():
    images = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0)) * 7
    assert torch.equal(resize_tf1(images, (9, 8)), images)
    assert resize_tf1(images.double(), 5).dtype == torch.float32


def test_the_first_pixel_stays_in_its_corner_where_half_pixel_rules_move_it():
    images = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert resize_tf1(images, 4)[0, 0].tolist() == [[0, 0.5, 1, 1], [1, 1.5, 2, 2], [2, 2.5, 3, 3], [2, 2.5, 3, 3]]


@pytest.mark.parametrize(
    ("images", "size", "says"),
    [
        (
            torch.zeros(3, 8, 8),
            4,
            r"expected uint8 or floating-point images \(B, C, H, W\), got torch.float32 \(3, 8, 8\)",
        ),
        (torch.zeros(1, 3, 0, 8), 4, r"\(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), 4, "torch.int64"),
        (torch.zeros(1, 3, 8, 8), (0, 4), "0 x 4 pixels"),
    ],
)
def test_what_cannot_be_resized_gets_one_line(images, size, says):
    with pytest.raises(DataError, match=says):
        resize_tf1(images, size)
