"""Inception Score: the numbers of the ADM suite, and cases worked out by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smalti.errors import ConfigError, DataError
from smalti.evaluation.features import FeatureSet
from smalti.evaluation.inception_score import INCEPTION_SCORE, SPLIT, inception_score
from smalti.evaluation.metric import GROUPS, group_of_each, jackknife

GOLDEN = Path(__file__).parents[1] / "data" / "parity"
FILES = json.loads((GOLDEN / "index_metrics_moments.json").read_text())["files"]
CASES = FILES["metric_inception_score.safetensors"]["cases"]
TENSORS = load_file(GOLDEN / "metric_inception_score.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_score_is_that_of_the_suite(case):
    logits = TENSORS[f"{case}.input.pool_features"] @ TENSORS["input.weight"]
    stated, split_size = float(TENSORS[f"{case}.output.inception_score"]), CASES[case]["split_size"]
    assert inception_score(logits, split_size=split_size) == pytest.approx(stated, rel=2e-5)  # the suite's is float32


def test_sure_and_even_answers_score_the_number_of_classes_and_equal_answers_score_one():
    assert inception_score(1000.0 * torch.eye(7)) == pytest.approx(7, rel=1e-12)
    assert inception_score(torch.randn(1, 7).expand(30, 7)) == pytest.approx(1, rel=1e-12)


def test_a_class_that_nobody_can_be_is_no_trouble():
    logits = torch.tensor([[0.0, -2000.0, 0.0], [0.0, -2000.0, 0.0]])
    assert inception_score(logits) == pytest.approx(1, rel=1e-12)


def test_a_shorter_last_split_weighs_as_much_as_the_others():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    parts = [inception_score(logits[:4]), inception_score(logits[4:])]
    assert inception_score(logits, split_size=4) == pytest.approx(sum(parts) / 2, rel=1e-12)
    assert parts[1] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("count", [45, 5001, 5600, 11_117])
def test_leaving_out_a_group_leaves_the_others_in_their_splits(count):
    logits = 3 * torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 5] -= 2000  # a class that nobody can be
    groups = group_of_each(count)
    found = INCEPTION_SCORE.family(FeatureSet({"logits": logits}), None, groups)["inception_score"]
    assert found.value == inception_score(logits)
    for out in range(GROUPS):
        splits = [rows[of != out] for rows, of in zip(logits.split(SPLIT), groups.split(SPLIT), strict=True)]
        each = [inception_score(rows) if len(rows) else 1.0 for rows in splits]  # one image alone scores 1
        assert found.without[out] == pytest.approx(sum(each) / len(each), rel=1e-12)


@pytest.mark.parametrize("count", [300, 5560])
def test_the_error_is_as_large_as_it_says_whether_or_not_a_short_split_is_left(count):
    values, said, groups = [], [], group_of_each(count)
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(count, 12, generator=g)
        logits[torch.arange(count), torch.randint(0, 12, (count,), generator=g)] += 4
        found = INCEPTION_SCORE.family(FeatureSet({"logits": logits}), None, groups)["inception_score"]
        values.append(found.value)
        said.append(jackknife(found).standard_error)
    # The spread of 30 values is known to 13 %; three times that, and a little for the jackknife's own bias.
    assert sum(said) / 30 == pytest.approx(float(torch.tensor(values).std()), rel=0.45)


def test_a_split_that_is_not_full_is_named():
    caution = INCEPTION_SCORE.caution(FeatureSet({"logits": torch.zeros(30, 4)}), None)
    assert "30 images do not fill a split of 5,000" in caution
    assert INCEPTION_SCORE.caution(FeatureSet({"logits": torch.zeros(5000, 4)}), None) == ""


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: inception_score(torch.zeros(3, 4), split_size=0), ConfigError, "split_size 0"),
        (lambda: inception_score(torch.zeros(0, 4)), DataError, "give some"),
    ],
)
def test_what_has_no_score_gets_one_line(call, error, says):
    with pytest.raises(error, match=says):
        call()
