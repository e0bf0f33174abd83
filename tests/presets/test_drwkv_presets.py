"""Diffusion-RWKV's presets: parameters to the number, multiply-adds within half a percent."""

import pytest

from smalti.cost import count_macs, count_parameters
from smalti.models import DRWKVConfig
from smalti.nn.mixers import BiWKVConfig
from smalti.presets import PRESETS, create_model, find_preset, list_models

# GMACs counted on the released classes (arXiv:2404.04478), without Bi-WKV itself: 256 pixels, 512, CIFAR-10, CelebA-64.
SUFFIXES = ("", "-512", "-cifar10", "-celeba64")
GMACS = {
    "s-2": (6.849, 27.361, 6.848, 27.356),
    "s-4": (1.725, 6.863, 1.724, 6.859),
    "b-2": (13.202, 52.739, 13.201, 52.734),
    "b-4": (3.321, 13.216, 3.320, 13.211),
    "m-2": (23.468, 93.749, 23.466, 93.743),
    "m-4": (5.902, 23.486, 5.900, 23.480),
    "l-2": (78.207, 312.428, 78.204, 312.419),
    "l-4": (19.658, 78.235, 19.656, 78.226),
    "h-2": (139.030, 555.411, 139.027, 555.398),
    "h-4": (34.944, 139.068, 34.941, 139.055),
}
ROWS = [(f"drwkv-{size}{s}", g) for size, row in GMACS.items() for s, g in zip(SUFFIXES, row, strict=True)]


@pytest.mark.long  # parameters of all rows are counted by test_published.py in any case
@pytest.mark.parametrize(("name", "gmacs"), ROWS)
def test_a_preset_has_its_parameters_exactly_and_its_macs_within_half_a_percent(name, gmacs):
    preset, model = PRESETS[name], create_model(name, device="meta")
    parameters, macs = count_parameters(model), count_macs(model)
    assert parameters.total == parameters.trained == preset.published.total
    assert abs(macs.published / 1e9 - gmacs) <= 0.005 * gmacs
    config = preset.config
    # 13 operations per token and channel of each layer (sec. 3.2), two of them one multiply-add.
    assert macs.by_kind["scan"] == config.depth * (13 * config.grid.tokens * config.hidden_size // 2)


@pytest.mark.parametrize("size", ["s-2", "b-4", "h-2"])
def test_the_matrix_products_are_the_closed_form(size):
    config = PRESETS[f"drwkv-{size}"].config
    d, depth, p, n = config.hidden_size, config.depth, config.patch_size, config.grid.tokens
    blocks = depth * (4 + 9) * d**2 * n + depth // 2 * 2 * d**2 * n
    told = depth * 6 * d**2 + 2 * d**2 + 256 * d + d**2
    ends = n * d * p**2 * (4 + 8)
    assert count_macs(config).by_kind["linear"] == blocks + told + ends


def test_the_table_is_five_sizes_two_patches_and_four_data_sets_as_the_paper_s_network():
    names = list_models("drwkv-[sbmlh]-[24]*")
    assert sorted(names) == sorted(name for name, _ in ROWS)
    for name in names:
        config = PRESETS[name].config
        assert isinstance(config, DRWKVConfig)
        assert config.mixer == BiWKVConfig()
        assert (config.conditioning, config.skip, config.post_norm) == ("adaln_zero", "concat", False)
        unconditional = name.endswith(("cifar10", "celeba64"))
        assert (config.in_channels, config.num_classes) == ((3, 0) if unconditional else (4, 1000))
        assert config.sample_size == ((64, 64) if name.endswith(("512", "64")) else (32, 32))
    assert find_preset("DRWKV-S/2") is PRESETS["drwkv-s-2"]
    assert PRESETS["drwkv-s-2-cifar10"].title == "DRWKV-S/2 CIFAR-10"
