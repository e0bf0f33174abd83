"""The FID Inception network: folded weights, what a call gives and refuses, and what it leaves as it was."""

import dataclasses
import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from inception_recipe import KEYS, recipe_weights
from safetensors.torch import save_file

from smalti.errors import CheckpointError, ConfigError, DataError
from smalti.evaluation.features import FeatureNetwork, extract
from smalti.evaluation.metric import Metric, check_names
from smalti.evaluation.networks import NETWORKS, build_network, inception_weights
from smalti.evaluation.networks.inception import (
    WIDTHS,
    Convolution,
    InceptionFID,
    InceptionNetwork,
    PoolBranch,
    fold_batch_norm,
    inception_input,
)
from smalti.ops.float32 import whole_float32


@pytest.fixture(scope="module")
def weights():
    return recipe_weights()


@pytest.fixture(scope="module")
def network(weights):
    return InceptionNetwork(weights)


def images(count=1, size=32, seed=0):
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def without_batches(weights):
    return {key: tensor for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}


# --- the network


def test_its_layers_are_those_of_the_conversion_with_batch_norm_folded():
    keys = json.loads(KEYS.read_text())["keys"]
    convolutions = {
        key.removesuffix(".conv.weight"): shape for key, shape in keys.items() if key.endswith("conv.weight")
    }
    with torch.device("meta"):
        model = InceptionFID()
    found = {name: list(layer.weight.shape) for name, layer in model.named_modules() if isinstance(layer, Convolution)}
    assert found == convolutions
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "layer",
    [Convolution(6, 8, (1, 7)), Convolution(6, 8, 3, stride=2, same=False), PoolBranch(6, 8)],
    ids=lambda m: str(m),
)
def test_a_folded_layer_is_convolution_batch_norm_and_relu(layer, seeded):
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    raw = {"conv.weight": torch.randn_like(layer.weight), "bn.weight": torch.randn(8), "bn.bias": torch.randn(8)}
    raw |= {"bn.running_mean": torch.randn(8), "bn.running_var": torch.rand(8) + 0.01}
    model = torch.nn.ModuleDict({"a": layer})
    fc = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    folded = fold_batch_norm({f"a.{key}": value for key, value in raw.items()} | fc, model, "here")
    with torch.no_grad():
        layer.double().weight.copy_(folded["a.weight"])
        layer.bias.copy_(folded["a.bias"])
        found = layer(x)
    if isinstance(layer, PoolBranch):
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    raw = {key: value.double() for key, value in raw.items()}
    plain = F.conv2d(x, raw["conv.weight"], stride=layer.stride, padding=layer.padding)
    norm = [raw[f"bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    expected = F.batch_norm(plain, *norm, eps=0.001).relu()
    # Folded weights are rounded to float32 once; a sum of at most 54 products of them, and the bias.
    sums = F.conv2d(x.abs(), folded["a.weight"].double().abs(), stride=layer.stride, padding=layer.padding)
    bound = (sums + folded["a.bias"].double().abs()[:, None, None]) * torch.finfo(torch.float32).eps
    assert ((found - expected).abs() <= bound).all()


def test_black_is_minus_one_and_white_is_127_of_128():
    values = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    seen = inception_input(values)
    assert seen.shape == (3, 3, 299, 299)
    rounding = 255 / 128 * 4 * torch.finfo(torch.float32).eps  # of the two shares of each pixel and their sum
    for image, expected in zip(seen, (-1, 0, 127 / 128), strict=True):
        assert (image - expected).abs().max() <= rounding


def test_features_of_an_image_do_not_depend_on_its_neighbours(network):
    batch = images(3)
    together, alone = network(batch), network(batch[1:2])
    for kind, width in WIDTHS.items():
        assert together[kind].shape == (3, width)
        largest = alone[kind].abs().max()
        assert (together[kind][1:2] - alone[kind]).abs().max() <= 1e-5 * largest
        assert (together[kind][:1] - alone[kind]).abs().max() > 1e-3 * largest


def test_it_fits_the_pass_over_a_stream_and_gives_what_is_asked(weights, network):
    assert isinstance(network, FeatureNetwork)
    chosen = InceptionNetwork(weights, kinds=("pool", "feat64"))
    found = extract(images(1).split(1), chosen, micro_batch=1)
    assert {kind: tuple(rows.shape) for kind, rows in found.features.items()} == {"pool": (1, 2048), "feat64": (1, 64)}
    found.rows("pool").add_(1)  # an ordinary tensor, which autograd and its owner may use


# --- settings of the process


def test_shorter_float32_and_autocast_of_the_process_do_not_reach_it_and_are_left_as_they_were(network):
    plain = network(images())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = network(images())
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.matmul.allow_tf32
        with whole_float32():
            assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(found[kind], plain[kind]) for kind in WIDTHS)


# --- identity


def test_other_weights_than_the_published_may_not_be_called_fid(network):
    assert network.identity.name == "inception-custom"
    assert network.identity.resize == "299, bilinear as TensorFlow 1, (x - 128) / 128"
    assert network.identity.numerics == "float32 on cpu"
    fid = Metric("FID", "lower", ("pool",), "moments", lambda ours, reference, groups: {}, "", network="inception")
    with pytest.raises(
        ConfigError, match="FID is defined by the inception features, and these come from inception-custom"
    ):
        check_names(["fid"], {"fid": fid}, network.identity.name)


def test_the_hash_is_that_of_the_numbers_and_not_of_the_file(weights, network):
    plain = without_batches(weights)
    again = InceptionNetwork(dict(reversed(plain.items())))
    assert again.identity == network.identity
    plain["fc.bias"] = plain["fc.bias"].clone()
    plain["fc.bias"][3] += 1
    assert InceptionNetwork(plain).identity.weights != network.identity.weights


# --- what is refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"Mixed_5b.branch1x1.bn.bias": None}, "1 tensors missing.*Mixed_5b.branch1x1.bn.bias"),
        ({"AuxLogits.fc.weight": torch.zeros(2)}, "1 unexpected.*AuxLogits.fc.weight"),
        ({"fc.weight": torch.zeros(1000, 2048)}, r"found \[1000, 2048\], expected \[1008, 2048\]"),
        ({"fc.bias": torch.zeros(1008, dtype=torch.int64)}, r"fc.bias \(torch.int64\) is not made of finite numbers"),
        ({"Conv2d_1a_3x3.bn.bias": torch.full((32,), torch.nan)}, "Conv2d_1a_3x3.bn.bias"),
        ({"Conv2d_1a_3x3.bn.running_var": -torch.ones(32)}, "Conv2d_1a_3x3.bn.running_var has values below 0"),
    ],
)
def test_tensors_of_another_network_or_damaged_ones_get_one_line(weights, change, says):
    changed = {key: value for key, value in (weights | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=says) as caught:
        InceptionNetwork(changed, where="my.pth")
    assert str(caught.value).startswith("my.pth: ")
    assert "\n" not in str(caught.value)


def test_kinds_that_do_not_exist_are_named(weights):
    with pytest.raises(ConfigError, match=r"no features 'pol'.*did you mean 'pool'"):
        InceptionNetwork(weights, kinds=("pol",))


@pytest.mark.parametrize("batch", [torch.zeros(1, 3, 8, 8), images()[:, :1], images()[0], images()[:0]])
def test_images_that_are_not_8_bit_rgb_get_one_line(network, batch):
    with pytest.raises(DataError, match="expected 8-bit RGB images"):
        network(batch)


# --- by name


def test_a_file_of_own_weights_is_taken_by_path(weights, network, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(weights, path)
    built = build_network(f"inception:{path}")
    assert built.identity == network.identity


def test_the_published_file_alone_makes_the_network_that_fid_is_defined_by(weights, network, tmp_path, monkeypatch):
    path = tmp_path / "smalti" / inception_weights.FILE_NAME
    path.parent.mkdir()
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = build_network("inception")
    assert built.identity == dataclasses.replace(network.identity, name="inception")
    batch = images()
    assert all(torch.equal(built(batch)[kind], rows) for kind, rows in network(batch).items())


@pytest.mark.parametrize("spec", ["inception@299", "inception:"])
def test_a_spec_that_is_cut_short_or_has_a_size_is_refused(spec):
    assert "inception" in NETWORKS
    with pytest.raises(ConfigError, match="expected inception, or inception:PATH"):
        build_network(spec)
