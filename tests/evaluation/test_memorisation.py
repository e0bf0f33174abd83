"""The memorisation report: a copying model is found, an honest one is not, and intervals are exact."""

import json

import pytest
import torch

from smalti.errors import DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.memorisation import binomial_interval, memorisation, pixel_distances


def _set(count, seed):
    return FeatureSet({"pool": torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))})


def _images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("held_out", [_set(700, 3), None])
def test_new_draws_of_one_distribution_are_no_memorisation(held_out):
    found = memorisation(_set(900, 1), _set(800, 2), held_out)
    assert found.verdict.startswith("No sign of memorisation")
    assert found.compared_with == ("training" if held_out is None else "held-out")
    assert found.compared_count == (800 if held_out is None else 700)
    for share, quantile in zip(found.shares, (0.01, 0.1), strict=True):
        assert share.low <= share.share <= share.high
        assert share.low < 2.5 * quantile
        assert share.high > quantile / 2.5
    assert found.median == pytest.approx(found.real_median, rel=0.1)


def test_copies_are_found_and_named():
    training, ours = _set(800, 2), _set(900, 1)
    ours.rows("pool")[100:160] = training.rows("pool")[300:360]
    found = memorisation(ours, training, _set(700, 3), keep=60)
    assert found.verdict.startswith("Nearer to training images")
    assert {(pair.ours, pair.training) for pair in found.nearest} == {(100 + i, 300 + i) for i in range(60)}
    assert all(pair.distance == 0 for pair in found.nearest)
    assert found.shares[0].low > 0.01


def test_copies_are_found_where_the_training_set_holds_copies_itself():
    rows = _set(400, 2).rows("pool")
    training = FeatureSet({"pool": torch.cat([rows, rows[:10]])})
    found = memorisation(FeatureSet({"pool": rows[200:]}), training)
    assert found.shares[0].distance == 0
    assert found.shares[0].real_share == pytest.approx(20 / 410)
    assert found.verdict.startswith("Nearer to training images")


def test_images_far_from_training_are_said_to_be_far():
    far = FeatureSet({"pool": _set(500, 1).rows("pool") * 3})
    assert "farther from training images" in memorisation(far, _set(800, 2), _set(700, 3)).verdict


def test_the_report_is_plain_values_for_json():
    found = memorisation(_set(60, 1), _set(50, 2), keep=3).as_dict()
    assert json.loads(json.dumps(found))["nearest"][0].keys() == {"ours", "training", "distance"}
    assert len(found["nearest"]) == 3


def test_pixel_distances_are_rms_grey_levels():
    training = _images(40, 1)
    images = training[[7, 21]].clone()
    images[1] = (images[1].int() + torch.where(images[1] > 128, -3, 3)).to(torch.uint8)
    distances, indices = pixel_distances(images, training)
    assert distances.tolist() == pytest.approx([0.0, 3.0], abs=1e-12)
    assert indices.tolist() == [7, 21]
    among, _ = pixel_distances(training, training, same=True)
    flat = training.flatten(1).double()
    plain = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    torch.testing.assert_close(among, plain.min(dim=1).values / 60**0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [_images(4, 1).float(), _images(4, 1)[:, :2], _images(4, 1)[..., :3]])
def test_images_that_cannot_be_compared_are_refused(bad):
    with pytest.raises(DataError):
        pixel_distances(bad, _images(9, 2))


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (1, 20), (5, 20), (20, 20), (500, 50_000), (3, 7)])
def test_binomial_intervals_are_those_of_scipy(successes, trials):
    stats = pytest.importorskip("scipy.stats")
    exact = stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
    assert binomial_interval(successes, trials) == pytest.approx((exact.low, exact.high), rel=1e-8, abs=1e-12)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no share"):
        binomial_interval(1, 0)
