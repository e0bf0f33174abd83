"""Files of numbers: they come back as they were, and any change is noticed."""

import json
import math

import pytest
import torch

from smalti.errors import CheckpointError, ConfigError, DataError, NumericError, StorageError
from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.metric import GROUPS, Estimate, Metric, Values, jackknife
from smalti.evaluation.protocol import MetricRule, Protocol, Reference
from smalti.evaluation.results import (
    FloorValue,
    Number,
    Result,
    Source,
    difference,
    numbers_of,
    read_result,
    write_result,
)
from smalti.storage.sealed import NewerFormatError, seal, unseal


def result(**changes):
    values = {
        "source": Source("dit", "runs/dit", {"preset": "dit-emoji32", "step": 1000}),
        "protocol": Protocol(
            count=5000,
            image_size=(32, 32),
            class_labels="random",
            sampling={"sampler": "ddim", "guidance_interval": (0.0, 1.0)},
            network=NetworkIdentity("lite0", "a" * 64, "96, bilinear"),
            reference=Reference("emoji32", "b" * 64, 1906),
            metrics=(MetricRule("kid", "degree 3"),),
        ),
        "numbers": (
            Number(
                "kid",
                "KID-lite0",
                "lower",
                Estimate(0.1 + 0.2, 0.01, 0.28, 0.33, "few", tuple(0.3 + k / 700 for k in range(GROUPS))),
                FloorValue(1e-4, 400),
            ),
        ),
        "memorisation": {"sentence": "No image is a copy.", "copies": 0},
        "machine": {"device": "cpu"},
        "seconds": 12.5,
        "created": "2026-01-01T00:00:00Z",
    }
    return Result(**values | changes)


def test_a_result_comes_back_as_it_was_with_every_bit_of_its_numbers(tmp_path):
    path = tmp_path / "runs" / "dit" / "evaluation" / "kid.json"
    write_result(result(), path)
    assert read_result(path) == result()
    assert [p.name for p in path.parent.iterdir()] == ["kid.json"]
    write_result(result(seconds=None), path)  # an earlier one is replaced
    assert read_result(path).seconds is None


def test_any_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "r.json"
    write_result(result(), path)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match=r"r\.json"):
            read_result(path)


def test_a_file_of_a_newer_smalti_and_one_of_something_else_are_told_apart(tmp_path):
    path = tmp_path / "r.json"
    write_result(result(), path)
    body = unseal(path.read_bytes(), "r")
    path.write_bytes(seal(body | {"version": 2}))
    with pytest.raises(NewerFormatError, match="version 2"):
        read_result(path)
    path.write_bytes(seal(body | {"format": "smalti checkpoint"}))
    with pytest.raises(CheckpointError, match="'smalti checkpoint', expected 'smalti result'"):
        read_result(path)
    path.write_bytes(seal(body | {"surplus": 1}))
    with pytest.raises(CheckpointError, match="unknown setting 'surplus'"):
        read_result(path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="not written by smalti"):
        read_result(path)
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_result(tmp_path / "none.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_never_part_of_a_result(value):
    lonely = Estimate(1.0, without=(1.0, value))
    for estimate in (Estimate(value), Estimate(1.0, value, 0.0, 2.0), Estimate(1.0, 1.0, value, 2.0), lonely):
        with pytest.raises(NumericError, match="FID is not finite"):
            Number("fid", "FID", "lower", estimate)
    with pytest.raises(NumericError, match="FID is not finite"):
        Number("fid", "FID", "lower", Estimate(1.0), FloorValue(value, 10))
    with pytest.raises(ConfigError, match="machine facts"):
        result(machine={"load": value})


def test_a_forged_file_with_nan_in_it_is_refused(tmp_path):
    path = tmp_path / "r.json"
    write_result(result(), path)
    body = unseal(path.read_bytes(), "r")
    body["numbers"][0]["estimate"]["value"] = math.nan
    path.write_bytes(seal(body))
    with pytest.raises(CheckpointError, match="not finite"):
        read_result(path)


def test_the_file_is_plain_json_that_other_programs_read(tmp_path):
    write_result(result(), tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["numbers"][0]["estimate"]["value"] == 0.1 + 0.2
    assert document["protocol"]["sampling"]["guidance_interval"] == [0.0, 1.0]


def test_a_number_twice_or_without_a_rule_is_refused():
    number = result().numbers[0]
    with pytest.raises(ConfigError, match="got numbers kid, kid"):
        result(numbers=(number, number))
    with pytest.raises(ConfigError, match="rules for none"):
        result(protocol=Protocol())


def test_a_number_is_found_by_its_name():
    assert result().number("kid").label == "KID-lite0"
    with pytest.raises(ConfigError, match="dit has no number 'kit'; did you mean 'kid'"):
        result().number("kit")


def test_numbers_carry_the_label_that_their_network_allows():
    table = {"kid": Metric("KID", "lower", ("pool",), "features", lambda *_: {}, "degree 3")}
    (number,) = numbers_of({"kid": Estimate(1.0)}, table, network="lite0", floors={"kid": 0.5}, floor_count=100)
    assert (number.label, number.better, number.floor) == ("KID-lite0", "lower", FloorValue(0.5, 100))
    (number,) = numbers_of({"kid": Estimate(1.0)}, table, network="inception")
    assert (number.label, number.floor) == ("KID", None)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        write_result(result(), tmp_path / "file" / "r.json")
    assert "\n" not in str(caught.value)


def test_a_file_without_values_of_each_group_is_read_as_one_that_knows_none(tmp_path):
    path = tmp_path / "r.json"
    write_result(result(), path)
    body = unseal(path.read_bytes(), "r")
    del body["numbers"][0]["estimate"]["without"]
    path.write_bytes(seal(body))
    found = read_result(path).numbers[0].estimate
    assert found.without == ()
    assert found.value == 0.1 + 0.2


# --- differences of two numbers


def _spread(sets):
    """The Frechet distance of one feature to a standard normal, by hand, of sets (T, N); as `jackknife` takes it."""

    def distances(rows):
        return rows.mean(dim=1) ** 2 + (rows.std(dim=1) - 1) ** 2

    folds = sets.unflatten(1, (GROUPS, -1))
    kept = [torch.cat([folds[:, :g], folds[:, g + 1 :]], dim=1).flatten(1) for g in range(GROUPS)]
    values, without = distances(sets).tolist(), torch.stack([distances(rows) for rows in kept], dim=1).tolist()
    return [jackknife(Values(value, tuple(rest))) for value, rest in zip(values, without, strict=True)]


def _two_kinds_of_sets(shared, trials=2000, count=400):
    """Numbers of two networks, one a little worse, of which a share of the variance is common, and the true gap."""
    generator = torch.Generator().manual_seed(3)
    common, one, other = torch.randn(3, trials, count, generator=generator, dtype=torch.float64)
    mixed = [shared**0.5 * common + (1 - shared) ** 0.5 * own for own in (one, other)]
    first, second = mixed[0] + 0.8, 1.2 * mixed[1] + 1.0
    return list(zip(_spread(first), _spread(second), strict=True)), 1.0**2 + 0.2**2 - 0.8**2


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_intervals_of_differences_cover_the_truth_for_independent_and_for_paired_sets(shared):
    pairs, truth = _two_kinds_of_sets(shared)
    gaps = [difference(a, b, same_groups=True) for a, b in pairs]
    covered = sum(gap.low <= truth <= gap.high for gap in gaps) / len(gaps)
    # Three standard errors of 2000 trials are 0.015; the other 0.005 is for the bias of a distance of 400 numbers.
    assert abs(covered - 0.95) <= 0.02


def test_a_difference_group_by_group_is_sharper_for_paired_sets_and_no_wider_for_independent_ones():
    def mean_errors(shared):
        pairs, _ = _two_kinds_of_sets(shared, trials=500)
        by_groups = [difference(a, b, same_groups=True).standard_error for a, b in pairs]
        return sum(by_groups) / sum(difference(a, b).standard_error for a, b in pairs)

    # Both standard errors estimate one thing for independent sets; from nine degrees of freedom one of them is 1.4 %
    # below it in the mean, the other, from nearly eighteen, less.
    assert mean_errors(0.0) == pytest.approx(1.0, abs=0.03)
    # With 0.8 of the variance shared, gaps have about a fifth of it: less than half of the error.
    assert mean_errors(0.8) < 0.55


def test_a_difference_is_worked_out_by_hand():
    a = jackknife(Values(1.0, tuple(1 + 0.1 * k for k in range(GROUPS))))
    b = jackknife(Values(3.0, tuple(2.5 + 0.1 * k for k in range(GROUPS))))
    paired = difference(a, b, same_groups=True)
    assert paired.value == 2.0
    assert paired.standard_error == pytest.approx(0.0, abs=1e-12)  # the same in every group, whatever both share
    assert paired.without == pytest.approx((1.5,) * GROUPS)
    apart = difference(a, b)
    assert apart.standard_error == pytest.approx(math.hypot(a.standard_error, b.standard_error))
    assert apart.without == ()


@pytest.mark.parametrize("known", [(), (1.0, 2.0)])
def test_without_values_of_each_group_both_errors_are_added(known):
    a, b = Estimate(10.0, 0.3, without=known), Estimate(12.0, 0.4, without=(1.0,) * GROUPS)
    gap = difference(a, b, same_groups=True)
    assert (gap.value, gap.standard_error) == (2.0, pytest.approx(0.5))
    assert gap.high - gap.value == pytest.approx(2.262157 * 0.5)
    assert difference(Estimate(10.0), b, same_groups=True) is None
