"""The door of feature networks: features belong to an image alone, and to exactly the network that is named."""

import dataclasses
from pathlib import Path

import pytest
import torch
from inception_recipe import recipe_weights
from pages import names_of
from safetensors.torch import save_file

from smalti.errors import ConfigError, SmaltiError
from smalti.evaluation.features import KINDS, FeatureNetwork, extract
from smalti.evaluation.networks import NETWORKS, build_network

BATCH = 3


def _inception(folder: Path) -> str:
    save_file(recipe_weights(), folder / "weights.safetensors")
    return f"inception:{folder / 'weights.safetensors'}"


def _lite0(folder: Path) -> str:
    return "lite0@32"


def _dinov2(folder: Path) -> str:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config)
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return f"dinov2:{folder}"


def _colours(folder: Path) -> str:
    return "colours"


# What to ask for, from a folder that may be written to; small, or with made-up weights where the real ones are not at
# hand. A new network adds its line here and gets every test below. The last one is that of the documentation.
SPECS = {"inception": _inception, "lite0": _lite0, "dinov2": _dinov2, "colours": _colours}
NAMES = pytest.mark.parametrize("name", SPECS)


@pytest.fixture(scope="module", autouse=True)
def of_the_documentation():
    """docs/adding/feature_network.md puts its network into the table."""
    before = dict(NETWORKS)
    yield names_of("adding/feature_network.md")
    NETWORKS.clear()
    NETWORKS.update(before)


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory):
    made = {}

    def spec(name):
        if name not in made:
            made[name] = SPECS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return spec


@pytest.fixture(scope="module")
def network_of(spec_of):
    made = {}

    def network(name):
        if name not in made:
            made[name] = build_network(spec_of(name))
        return made[name]

    return network


def _images(count, rows=20, columns=31, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, rows, columns), dtype=torch.uint8, generator=g)


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[kind], b[kind]) for kind in a)


def test_every_network_of_the_table_is_tested():
    assert set(SPECS) == set(NETWORKS)


@NAMES
def test_it_is_a_feature_network_and_says_what_it_is(network_of, name):
    network = network_of(name)
    assert isinstance(network, FeatureNetwork)
    identity = network.identity
    assert identity.name.partition("-")[0] == name  # inception-custom: weights that are not the published ones
    assert len(identity.weights) == 64
    assert set(identity.weights) <= set("0123456789abcdef")
    assert identity.numerics == "float32 on cpu"
    assert all(text and "\n" not in text for text in dataclasses.astuple(identity))
    assert set(network.widths) <= set(KINDS)
    assert "pool" in network.widths  # every metric that takes any network looks at it


@NAMES
@pytest.mark.parametrize("size", [(8, 9), (31, 64), (300, 33)])
def test_images_of_any_size_give_as_many_features_as_it_says_in_float32_on_the_cpu(network_of, name, size):
    network = network_of(name)
    found = network(_images(2, *size))
    assert {kind: (tuple(rows.shape), rows.dtype, rows.device.type) for kind, rows in found.items()} == {
        kind: ((2, width), torch.float32, "cpu") for kind, width in network.widths.items()
    }
    for rows in found.values():
        assert rows.isfinite().all()
        assert not torch.equal(rows[0], rows[1])
        assert not rows.requires_grad
        rows += 1  # an ordinary tensor, which belongs to whoever asked


@NAMES
@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_and_grey_images_are_images_too(network_of, name, value):
    flat = torch.full((1, 3, 16, 24), value, dtype=torch.uint8)
    grey = _images(1, 16, 24)[:, :1].expand(-1, 3, -1, -1)  # three channels of one memory
    network = network_of(name)
    assert all(rows.isfinite().all() for rows in network(torch.cat([flat, grey])).values())
    assert _equal(network(grey), network(grey.contiguous()))


@NAMES
def test_features_of_an_image_do_not_depend_on_its_neighbours_or_its_place(network_of, name):
    network, images = network_of(name), _images(BATCH)
    found = network(images)
    assert _equal(network(images), found)
    for place in (0, BATCH - 1):
        others = _images(BATCH, seed=1 + place)
        others[place] = images[1]
        again = network(others)
        for kind, rows in found.items():
            assert torch.equal(again[kind][place], rows[1]), (kind, place)


@NAMES
def test_how_a_stream_is_cut_changes_no_feature(network_of, name):
    network, images = network_of(name), _images(BATCH + 2)
    whole = extract([images], network, micro_batch=BATCH).features
    assert set(whole) == set(network.widths)
    assert _equal(extract(images.split(1), network, micro_batch=BATCH).features, whole)


@NAMES
def test_colours_and_borders_show_in_the_features(network_of, name):
    network, images = network_of(name), _images(1).repeat(7, 1, 1, 1) // 2
    for channel in range(3):
        images[1 + channel, channel] += 60
    images[4, :, :4], images[5, :, :, -4:], images[6, :, :, :4] = 250, 250, 250
    rows = network(images)["pool"].double()
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
    assert distances.min() > 1e-3 * rows.norm(dim=1).mean()  # of rounding, a thousandth of this


@NAMES
def test_building_it_again_gives_the_same_to_the_bit_and_leaves_the_process_as_it_was(network_of, spec_of, name):
    def state():
        backends = torch.backends
        rules = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
        return (
            [rule.fp32_precision for rule in rules],
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            (backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.enabled),
            (torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()),
            (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
            torch.random.get_rng_state().tolist(),
        )

    before = state()
    network = build_network(spec_of(name))
    found = network(_images(1))
    assert state() == before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = state()
        mixed = network(_images(1))
        assert state() == within
    assert _equal(mixed, found)  # in float32 whatever the caller trains in
    assert network.identity == network_of(name).identity  # the other was built before
    assert _equal(network_of(name)(_images(1)), found)


@NAMES
def test_the_default_dtype_of_the_caller_changes_nothing(network_of, spec_of, name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        network = build_network(spec_of(name))
        found = network(_images(1))
    finally:
        torch.set_default_dtype(before)
    assert network.identity == network_of(name).identity
    assert _equal(found, network_of(name)(_images(1)))


@NAMES
@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
    ids=["float", "one channel", "no batch"],
)
def test_what_is_no_batch_of_8_bit_rgb_images_is_refused_in_one_line(network_of, name, wrong):
    with pytest.raises(SmaltiError, match="expected 8-bit RGB images") as caught:
        network_of(name)(wrong)
    assert "\n" not in str(caught.value)


@NAMES
@pytest.mark.parametrize("rest", ["@", ":", "@x"])
def test_a_spelling_that_makes_no_sense_is_refused_before_anything_is_loaded(name, rest):
    with pytest.raises(ConfigError, match=name) as caught:
        build_network(name + rest)
    assert "\n" not in str(caught.value)


def test_an_unknown_network_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"did you mean 'inception'.*inception, lite0, dinov2"):
        build_network("incepton")
