"""Precision, recall, density and coverage against brute force, and without each group against doing it again."""

import pytest
import torch

import smalti.evaluation.neighbours as module
from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import GROUPS, group_of_each, measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.precision_recall import density_coverage, precision_recall


def _set(count, width=8, seed=0, spread=1.0, shift=0.0):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spread + shift
    return FeatureSet({"pool": rows})


OURS, REAL = _set(230, seed=1, spread=0.8, shift=0.2), _set(170, seed=2)


def _distances(a, b):
    return torch.cdist(a.rows("pool").double(), b.rows("pool").double(), compute_mode="donot_use_mm_for_euclid_dist")


def _radii(a, k):
    return _distances(a, a).sort().values[:, k]


def _brute(ours, real):
    between = _distances(real, ours)
    my_radii, real_radii = _radii(ours, 3), _radii(real, 3)
    wide = _radii(real, 5)[:, None]
    return {
        "precision": (between <= real_radii[:, None]).any(dim=0).double().mean().item(),
        "recall": (between <= my_radii).any(dim=1).double().mean().item(),
        "density": ((between < wide).double().sum(dim=0) / 5).mean().item(),
        "coverage": (between < wide).any(dim=1).double().mean().item(),
    }


def _both(ours, real, groups=None, rule="exact"):
    return {**precision_recall(ours, real, groups, rule=rule), **density_coverage(ours, real, groups)}


@pytest.mark.parametrize("tile", [13, 1280])
def test_all_four_are_those_of_brute_force(tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE", tile)
    found, plain = _both(OURS, REAL), _brute(OURS, REAL)
    assert {name: values.value for name, values in found.items()} == pytest.approx(plain, abs=1e-12)
    assert 0.1 < plain["recall"] < 0.95  # not a case where everything or nothing is inside
    assert 0.1 < plain["coverage"] < 1.0


@pytest.mark.parametrize("rule", ["suite", "exact"])
@pytest.mark.parametrize("tile", [13, 1280])
def test_numbers_without_a_group_are_those_of_the_images_left(rule, tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE", tile)
    groups = group_of_each(OURS.count)
    found = _both(OURS, REAL, groups, rule)
    again = [_both(OURS.subset((groups != group).nonzero()[:, 0]), REAL, rule=rule) for group in range(GROUPS)]
    whole = _both(OURS, REAL, rule=rule)
    for name, values in found.items():
        assert values.value == pytest.approx(whole[name].value, abs=1e-12)
        assert values.without == pytest.approx([one[name].value for one in again], abs=1e-12)
        assert len(set(values.without)) > 1


def test_images_among_the_real_ones_count_although_their_distance_is_a_radius():
    # The third neighbour of a real image is one of ours too: its distance equals the radius, and the ball is closed.
    line = FeatureSet({"pool": torch.tensor([[0.1], [0.2], [0.4], [0.7], [50.0]])})
    for rule in ("suite", "exact"):
        assert precision_recall(line, line, rule=rule)["precision"].value == 1.0
        assert precision_recall(line, line, rule=rule)["recall"].value == 1.0


def _on_a_grid(real, ours):
    """All four on points whose distances are whole numbers: density and coverage as the package `prdc` 0.2 of their
    authors defines them, balls without their surface; precision and recall with it, as the suite."""
    squared = [(a[:, None] - b).square().sum(-1) for a, b in ((real, real), (ours, ours), (real, ours))]
    among, mine = (d.sort().values for d in squared[:2])  # the point itself stands at 0
    between = squared[2]
    opened, closed = between < among[:, 5, None], between <= among[:, 3, None]
    assert (between == among[:, 5, None]).any()
    return {
        "precision": closed.any(0).double().mean().item(),
        "recall": (between <= mine[:, 3]).any(1).double().mean().item(),
        "density": opened.double().sum(0).mean().item() / 5,
        "coverage": opened.any(1).double().mean().item(),
    }


# On a grid distances are equal to the last bit; scaled by 0.1 and moved they are so only up to rounding.
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.1, 3.0)])
def test_the_surface_of_a_ball_is_inside_for_precision_and_recall_and_outside_for_density_and_coverage(scale, shift):
    generator = torch.Generator().manual_seed(0)
    real, ours = (torch.randint(0, 9, (n, 3), generator=generator).double() + more for n, more in ((90, 0), (80, 3)))
    plain = _on_a_grid(real, ours)
    assert all(0.1 < value < 0.95 for value in plain.values())
    found = _both(FeatureSet({"pool": ours * scale + shift}), FeatureSet({"pool": real * scale + shift}))
    assert {name: values.value for name, values in found.items()} == pytest.approx(plain, abs=1e-12)


def test_images_that_are_all_the_same_are_on_every_surface():
    same = FeatureSet({"pool": torch.full((20, 3), 0.3)})
    for rule in ("suite", "exact"):
        found = {name: values.value for name, values in _both(same, same, rule=rule).items()}
        assert found == {"precision": 1.0, "recall": 1.0, "density": 0.0, "coverage": 0.0}


@pytest.mark.parametrize("side", ["ours", "real"])
def test_one_image_far_away_blurs_no_distance_between_the_others(side):
    ours, real = OURS.rows("pool").clone(), REAL.rows("pool").clone()
    rest = {
        "ours": (FeatureSet({"pool": ours[1:]}), REAL),
        "real": (OURS, FeatureSet({"pool": real[1:]})),
    }[side]
    {"ours": ours, "real": real}[side][0] = 1e10
    found = density_coverage(FeatureSet({"pool": ours}), FeatureSet({"pool": real}))
    without = density_coverage(*rest)
    # The odd one of ours is in no ball; the odd real one's ball reaches to its fifth neighbour and holds all but a few.
    held = {"ours": (0, 0), "real": (None, 1)}[side]
    pairs, places = without["density"].value * rest[0].count, without["coverage"].value * rest[1].count
    assert found["coverage"].value * len(real) == pytest.approx(places + held[1], abs=1e-9)
    if side == "ours":
        assert found["density"].value * len(ours) == pytest.approx(pairs, abs=1e-9)
    # Of precision, nothing changes but the odd one's own answer.
    exact = precision_recall(FeatureSet({"pool": ours}), REAL, rule="exact")["precision"].value
    if side == "ours":
        alone = precision_recall(*rest, rule="exact")["precision"].value
        assert exact * len(ours) == pytest.approx(alone * (len(ours) - 1), abs=1e-9)


def test_features_that_float16_cannot_tell_apart_are_named():
    caution = METRICS["precision"].caution
    for rows in (OURS.rows("pool") * 1e-6, OURS.rows("pool") + 1000):
        assert "float16 changes squared distances" in caution(OURS, FeatureSet({"pool": rows}))
    for rows in (OURS.rows("pool"), OURS.rows("pool") * 1e4, OURS.rows("pool")[:1].expand(230, -1)):
        assert "float16" not in caution(OURS, FeatureSet({"pool": rows}))
    assert "float16" not in METRICS["density"].caution(OURS, FeatureSet({"pool": OURS.rows("pool") * 1e-6}))


def test_one_distribution_has_the_density_and_coverage_that_theory_says():
    found = density_coverage(_set(1500, width=3, seed=5), _set(1500, width=3, seed=6))
    # A ball holds 5 +- sqrt(10) of ours; balls overlap, five deep: 1,500 of them are worth 300.
    assert found["density"].value == pytest.approx(1.0, abs=3 * (10 / 300) ** 0.5 / 5)
    assert found["coverage"].value == pytest.approx(1 - 2**-5, abs=0.02)  # 4 standard errors of 1,500 images


def test_float32_is_used_where_float16_overflows():
    ours, real = _set(60, seed=3, spread=300.0), _set(70, seed=4, spread=300.0)
    suite, exact = precision_recall(ours, real), precision_recall(ours, real, rule="exact")
    assert suite["precision"].value == exact["precision"].value
    assert suite["recall"].value == exact["recall"].value


def test_the_table_has_all_four_with_intervals_and_says_what_few_images_do():
    found = measure(OURS, REAL, ["precision", "recall", "density", "coverage"], METRICS, network="lite0")
    for estimate in found.values():
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.standard_error > 0
        assert "230 images against 170" in estimate.caution
    assert METRICS["precision"].label_for("lite0") == "Precision-lite0"


@pytest.mark.parametrize(
    ("ours", "real", "says"),
    [
        (_set(3), REAL, "3 images are too few"),
        (OURS, _set(3), "3 images are too few"),
        (OURS, _set(50, width=9), "use the same feature network"),
        (OURS, None, "give a reference"),
        (OURS.subset([]), REAL, "0 images of ours"),
        (OURS, REAL.subset([]), "0 real ones"),
        (_set(50, spread=1e20), REAL, "beyond float32"),
    ],
)
def test_what_cannot_be_compared_gets_one_line(ours, real, says):
    with pytest.raises(DataError, match=says):
        precision_recall(ours, real)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="choose suite or exact"):
        precision_recall(OURS, REAL, rule="sweet")
