"""What papers print: every row is well formed, and names networks that exist."""

import re

import pytest

from smalti.errors import ConfigError
from smalti.evaluation.metrics import METRICS
from smalti.presets import PRESETS
from smalti.presets.published import METRICS_PRINTED, PublishedResult, published

ROWS = published()
EACH = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.title}-{row.resolution}")


@EACH
def test_a_row_has_a_number_a_source_and_values_that_are_possible(row):
    assert isinstance(row, PublishedResult)
    numbers = row.numbers()
    assert "fid" in numbers
    assert 1.5 < row.fid < 200
    assert row.sfid is None or 3 < row.sfid < 30
    assert row.inception_score is None or 1 < row.inception_score < 300
    assert all(0 < numbers[name] < 1 for name in ("precision", "recall") if name in numbers)
    assert row.resolution in (32, 64, 128, 256, 512)
    assert row.guidance_scale is None or 1 <= row.guidance_scale <= 2
    assert row.parameters_m is None or 30 < row.parameters_m < 1000
    assert row.count in (None, 10_000, 50_000)
    assert re.search(r"arXiv:\d{4}\.\d{5}|README", row.source) or "DiCo" in row.source
    assert (row.gmacs is None) == (row.gmacs_counting == "")


@EACH
def test_a_row_names_a_preset_that_exists_and_agrees_with_it(row):
    if not row.preset:
        return
    preset = PRESETS[row.preset]
    side = row.resolution // 8 if row.dataset == "ImageNet" else row.resolution
    assert preset.config.sample_size == (side, side)
    assert row.model.replace("-", "").lower() in row.preset.replace("-", "")
    if preset.published.parameters_m is not None and row.parameters_m is not None:
        assert row.parameters_m == pytest.approx(preset.published.parameters_m, abs=1)


def test_images_seen_are_steps_times_batch_to_the_rounding_of_the_print():
    checked = 0
    for row in ROWS:
        if None not in (row.steps, row.batch_size, row.images_m):
            assert row.images_m == pytest.approx(row.steps * row.batch_size / 1e6, rel=2e-3)
            checked += 1
    assert checked > 50


def test_nothing_is_there_twice():
    seen = [(row.title, row.preset, row.dataset, row.resolution, row.steps, row.numbers().items()) for row in ROWS]
    assert len({str(key) for key in seen}) == len(ROWS)


def test_the_best_known_row_is_what_the_paper_prints():
    (row,) = (r for r in published("DiT-XL/2") if r.guidance_scale == 1.5 and r.decoder == "ft-EMA")
    assert (row.fid, row.sfid, row.inception_score, row.precision, row.recall) == (2.27, 4.60, 278.24, 0.83, 0.57)
    assert row.certainty == "paper"
    assert row.stated() == {
        "images": "50,000",
        "image_size": "256",
        "sampler": "ddpm",
        "num_inference_steps": "250",
        "guidance_scale": "1.5",
        "guidance_channels": "3",
        "decoder": "ft-EMA",
    }


def test_rows_are_found_by_preset_family_and_resolution():
    assert {row.preset for row in published("dit_xl_2")} == {"dit-xl-2"}
    assert {row.resolution for row in published("DiT-XL/2 512")} == {512}
    assert {row.model for row in published("adm")} == {"ADM"}
    assert {row.resolution for row in published("DiffuSSM", resolution=512)} == {512}
    assert len(published()) == 140


@pytest.mark.parametrize("name", ["dit-xl-3", "gpt", "udit-l-512"])
def test_a_model_that_nobody_wrote_about_is_one_line(name):
    with pytest.raises(ConfigError, match=r"published|prints") as caught:
        published(name)
    assert "\n" not in str(caught.value)


def test_what_is_printed_has_the_names_of_metrics():
    assert set(METRICS_PRINTED) <= set(METRICS)
