"""The floor: real images against real images."""

import pytest
import torch

from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.floors import clean_floor
from smalti.evaluation.metric import Metric, Values, measure
from smalti.evaluation.metrics import METRICS


def _real(count=300, width=12, seed=0):
    return FeatureSet({"pool": torch.randn(count, width, generator=torch.Generator().manual_seed(seed))})


def _floor(reference, count, names=("fd", "kid"), **kwargs):
    return clean_floor(reference, count, names, METRICS, network="lite0", **kwargs)


def test_a_perfect_generator_scores_the_floor():
    floor = _floor(_real(), 100, repeats=5)
    assert (floor.count, floor.against) == (100, 200)
    perfect = [
        measure(_real(100, seed=seed), _real(200, seed=seed + 1), ["fd"], METRICS, network="lite0")["fd"].value
        for seed in range(10, 30, 2)
    ]
    spread = float(torch.tensor(perfect).std())
    assert floor.values["fd"] == pytest.approx(sum(perfect) / len(perfect), abs=3 * spread)
    assert floor.values["fd"] > 5 * abs(floor.values["kid"])  # fd of 100 images is far from 0, kid is honest


def test_the_floor_falls_with_the_number_of_images_and_is_the_same_every_time():
    real = _real()
    assert _floor(real, 100).values["fd"] < _floor(real, 30).values["fd"]
    assert _floor(real, 30) == _floor(real, 30)


def test_each_draw_is_new_and_holds_every_image_once_on_one_side():
    real, seen = FeatureSet({"pool": torch.arange(31.0)[:, None]}), []

    def look(ours, reference, groups):
        seen.append(tuple(sorted(side.rows("pool")[:, 0].tolist()) for side in (ours, reference)))
        return {"look": Values(float(len(seen)))}

    table = {"look": Metric("Look", "lower", ("pool",), "features", look, "looks")}
    assert clean_floor(real, 12, ["look"], table, network="lite0", repeats=3).values["look"] == 2.0  # the mean
    assert all(len(taken) == 12 and sorted(taken + rest) == list(range(31)) for taken, rest in seen)
    assert len({tuple(taken) for taken, _ in seen}) == 3


def test_no_more_than_half_of_the_reference_is_taken_and_said():
    floor = _floor(_real(101), 5000)
    assert (floor.count, floor.against) == (50, 51)


def test_only_comparisons_for_which_there_are_features_have_a_floor():
    real = _real()
    names = ["fid", "sfid", "inception_score", "kid"]
    assert set(clean_floor(real, 50, names, METRICS, network="inception").values) == {"fid", "kid"}
    stated = FeatureSet({}, {"pool": real.moments("pool")})
    assert clean_floor(stated, 50, names, METRICS, network="inception").values == {}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: _floor(_real(), 1), DataError, "at least 2"),
        (lambda: _floor(_real(), 30, repeats=0), ConfigError, "repeats 0"),
        (lambda: _floor(_real(), 30, ["fdd"]), ConfigError, "did you mean 'fd'"),
        (lambda: _floor(_real(), 30, ["fid"]), ConfigError, "defined by the inception features"),
    ],
)
def test_a_floor_that_cannot_be_computed_gets_one_line(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_kinds_of_features_are_taken_apart_from_one_another_with_the_same_images_on_each_side():
    numbers, seen = torch.arange(31.0)[:, None], []

    def look(kind):
        def family(ours, reference, groups):
            assert set(ours.features) == set(reference.features) == {kind}
            seen.append((kind, tuple(ours.rows(kind)[:, 0].tolist())))
            return {kind: Values(0.0)}

        return Metric("Look", "lower", (kind,), "features", family, "looks")

    table = {kind: look(kind) for kind in ("pool", "spatial")}
    clean_floor(FeatureSet({"pool": numbers, "spatial": numbers}), 12, table, table, network="lite0", repeats=2)
    assert [kind for kind, _ in seen] == ["pool", "spatial"] * 2
    assert [len({rows for _, rows in seen[i : i + 2]}) for i in (0, 2)] == [1, 1]
