"""The FID Inception network against numbers of torch-fidelity, for weights that a recipe makes."""

import json
from pathlib import Path

import pytest
import torch
from inception_recipe import recipe_weights
from safetensors.torch import load_file

from smalti.evaluation.networks.inception import EARLY_WIDTHS, WIDTHS, InceptionNetwork, inception_input

DATA = Path(__file__).parents[1] / "data" / "parity"
GOLDEN = load_file(DATA / "inception_fid.safetensors")
INDEX = json.loads((DATA / "index_inception.json").read_text())["files"]["inception_fid.safetensors"]
RELEASED_NAMES = {"pool": "pool3", "spatial": "sfid_spatial", "logits": "logits_unbiased"}
TOLERANCE = 1e-5  # of the largest value; the index's own, about three times float32's distance from float64
IMAGES = ("img0", "img1", "img2")


@pytest.fixture(scope="module")
def weights():
    return recipe_weights()


@pytest.fixture(scope="module")
def network(weights):
    return InceptionNetwork(weights, kinds=tuple(WIDTHS | EARLY_WIDTHS))


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_recipe_makes_the_weights_that_the_numbers_were_made_with(weights):
    for key, values in INDEX["hyperparams"]["recipe_check"].items():
        assert weights[key].flatten()[:3].tolist() == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("image", IMAGES)
def test_all_features_are_those_of_torch_fidelity(network, image):
    found = network(GOLDEN[f"{image}.input.image"])
    assert set(found) == set(WIDTHS | EARLY_WIDTHS)
    for kind, rows in found.items():
        expected = GOLDEN[f"{image}.output.{RELEASED_NAMES.get(kind, kind)}"]
        assert rows.shape == expected.shape
        assert rows.dtype == torch.float32
        assert error(rows, expected) <= TOLERANCE, kind


@pytest.mark.parametrize("image", IMAGES)
def test_the_network_sees_images_as_torch_fidelity_resizes_and_scales_them(image):
    seen = inception_input(GOLDEN[f"{image}.input.image"])[:, :, ::23, ::29]
    assert error(seen, GOLDEN[f"{image}.output.resized_normalised_sub"]) <= TOLERANCE


def test_the_other_resize_would_be_seen(network):
    """pytorch-fid's numbers for the same weights and image are far from ours, so the resize is part of an identity."""
    found = network(GOLDEN["img1.input.image"])["pool"]
    assert error(found, GOLDEN["img1.output_pytorch_fid.pool3"]) > 100 * TOLERANCE
