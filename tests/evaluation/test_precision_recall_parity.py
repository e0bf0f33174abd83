"""Frozen numbers of the ADM suite, and of the sums under it. What each file is: README_metrics_neighbours.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.evaluation.features import FeatureSet
from smalti.evaluation.metric import measure
from smalti.evaluation.metrics import METRICS
from smalti.evaluation.neighbours import Exact, neighbour_radii
from smalti.evaluation.precision_recall import Half, Single, precision_recall, sum_in_half

DATA = Path(__file__).parents[1] / "data" / "parity"
GOLDEN = load_file(DATA / "metric_precision_recall.safetensors")
CASES = sorted(json.loads((DATA / "index_metrics_neighbours.json").read_text())["files"].popitem()[1]["cases"])
TF = load_file(DATA / "tf_half_sums.safetensors")


def test_the_seven_cases_are_there():
    assert len(CASES) == 7


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rule", "kind"), [("suite", "output"), ("exact", "output_exact")])
def test_precision_and_recall_are_those_of_the_suite_and_of_float64(case, rule, kind):
    ours, real = (FeatureSet({"pool": GOLDEN[f"{case}.input.{name}"]}) for name in ("sample", "ref"))
    found = precision_recall(ours, real, rule=rule)
    for name in ("precision", "recall"):
        assert found[name].value == pytest.approx(GOLDEN[f"{case}.{kind}.{name}"].item(), abs=1e-12)


def test_what_the_table_calls_precision_and_recall_is_what_the_suite_prints_where_rounding_decides():
    ours, real = (FeatureSet({"pool": GOLDEN[f"fp16_sensitive.input.{name}"]}) for name in ("sample", "ref"))
    found = measure(ours, real, ["precision", "recall"], METRICS, network="inception", intervals=False)
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(
        {name: GOLDEN[f"fp16_sensitive.output.{name}"].item() for name in ("precision", "recall")}, abs=1e-12
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["ref", "sample"])
def test_radii_of_the_suite_are_the_same_to_the_bit(case, which):
    rows, golden = GOLDEN[f"{case}.input.{which}"], GOLDEN[f"{case}.output.radii_{which}_squared"]
    fallback = case == "large_norm_fp32_fallback"
    arithmetic = Single() if fallback else Half()
    found = neighbour_radii(arithmetic, arithmetic.points(rows), 3)[:, 0]
    if fallback:  # sums of 9 terms in float32, in another order: three sums, each within a few steps of the largest
        assert (found - golden).abs().max() <= 8 * torch.finfo(torch.float32).eps * rows.square().sum(1).max()
    else:
        assert torch.equal(found, golden)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["ref", "sample"])
def test_exact_radii_are_those_of_float64(case, which):
    rows, golden = GOLDEN[f"{case}.input.{which}"], GOLDEN[f"{case}.output_exact.radii_{which}_squared"]
    arithmetic = Exact(rows.double().mean(dim=0))
    points = arithmetic.points(rows)
    found = neighbour_radii(arithmetic, points, 3)[:, 0]
    assert (found - golden).abs().max() <= 0.1 * arithmetic.tie * points.norms.max()


@pytest.mark.parametrize("width", sorted(int(name.removeprefix("output.w")) for name in TF if ".w" in name))
def test_sums_in_float16_are_those_of_tensorflow(width):
    assert torch.equal(sum_in_half(TF["input.squares"][:, :width]), TF[f"output.w{width}"])


def test_distances_of_wide_features_are_those_of_tensorflow():
    half = Half()
    a, b = half.points(TF["input.sample"].float()), half.points(TF["input.ref"].float())
    products = half.products(a, slice(0, 24), b, slice(0, 20))
    found, golden = half.squared(products, a.norms, b.norms), TF["output.distances"].float()
    # Products of 2,048 terms are summed in float32 in an order of the machine's own: one in a thousand may round to
    # the float16 beside. Between 512 and 1024, where twice the products lie, those are 0.5 apart.
    assert (found == golden).double().mean() > 0.98
    assert (found - golden).abs().max() <= 0.5
