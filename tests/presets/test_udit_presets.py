"""U-DiT's presets: parameters to the last one, multiply-adds as published, before and after fusing."""

import functools

import pytest

from smalti.cost.macs import count_macs, count_parameters
from smalti.presets import PRESETS, find_preset
from smalti.presets.udit import UDIT

ROWS = pytest.mark.parametrize("preset", UDIT, ids=lambda preset: preset.name)
# Counted on the released classes: total of the vanilla networks in millions, and GMACs of the graph with all branches
# side by side, which is what the released code trains.
VANILLA = {"udit-s-vanilla": 51.47, "udit-b-vanilla": 203.27, "udit-l-vanilla": 807.87}
RELEASED_TRAINING_GMACS = {"udit-s": 7.129, "udit-b": 26.509, "udit-l": 102.025}
# Ours for one image: a pair of layers stays a pair where multiplying it would cost more, and kernels are summed.
OUR_TRAINING_GMACS = {"udit-s": 6.828, "udit-b": 25.916, "udit-l": 101.519}


@functools.cache
def macs(name, *, fused):
    return count_macs(PRESETS[name].config, fused=fused)


def test_the_paper_s_rows_are_there_under_its_spelling():
    assert [p.name for p in UDIT] == [f"udit-{size}{form}" for form in ("", "-512", "-vanilla") for size in "sbl"]
    for preset in UDIT:
        assert PRESETS[preset.name] is preset
        assert find_preset(preset.title) is preset
    assert find_preset("U-DiT-B") is PRESETS["udit-b"]


@ROWS
def test_parameters_are_exact_as_trained_and_fused(preset):
    counted = count_parameters(preset.config)
    if preset.name in VANILLA:
        assert round(counted.trained / 1e6, 2) == VANILLA[preset.name]
        assert counted.fused == counted.trained
        return
    assert counted.trained == counted.total == preset.published.total
    assert counted.fused == preset.published.fused_total
    assert round(counted.fused / 1e6, 2) == preset.published.parameters_m


@ROWS
def test_published_multiply_adds_are_those_of_the_fused_network(preset):
    if preset.published.gmacs is not None:
        fused = macs(preset.name, fused=True).published / 1e9
        assert abs(fused / preset.published.gmacs - 1) < 0.005


@pytest.mark.parametrize("name", RELEASED_TRAINING_GMACS)
def test_the_form_that_is_trained_costs_more_than_the_fused_and_less_than_the_released_one(name):
    trained, fused = macs(name, fused=False).published / 1e9, macs(name, fused=True).published / 1e9
    assert round(trained, 3) == OUR_TRAINING_GMACS[name]
    assert fused < trained < RELEASED_TRAINING_GMACS[name]


@pytest.mark.parametrize("name", RELEASED_TRAINING_GMACS)
def test_all_branches_side_by_side_cost_what_the_released_graph_costs(name):
    """From the shapes: what a pair of layers and the two small kernels add to the fused network."""
    config = PRESETS[name].config
    rows, columns = config.sample_size
    extra = 0
    for blocks, width, halvings in zip(config.depth, (1, 2, 4, 2, 2), (0, 1, 2, 1, 0), strict=True):
        tokens, w = (rows >> halvings) * (columns >> halvings), width * config.hidden_size
        extra += 2 * blocks * tokens * (2 * w * w + (9 + 1) * 2 * w)
    fused = macs(name, fused=True).published
    assert round((fused + extra) / 1e9, 3) == RELEASED_TRAINING_GMACS[name]


def test_a_quarter_of_the_attention_is_left():
    config = PRESETS["udit-s"].config
    by_kind = macs("udit-s", fused=True).by_kind
    full = sum(
        2 * blocks * 2 * (32 >> halvings) ** 4 * width * config.hidden_size
        for blocks, width, halvings in zip(config.depth, (1, 2, 4, 2, 2), (0, 1, 2, 1, 0), strict=True)
    )
    assert 4 * by_kind["attention"] == full
