"""When two numbers may stand in one column, and what is said when they may not."""

import dataclasses

import pytest

from smalti.config import from_dict, to_dict
from smalti.errors import ConfigError
from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.metric import Metric
from smalti.evaluation.protocol import (
    MetricRule,
    Protocol,
    Reference,
    check_allowed,
    differences,
    rules_of,
    sampling_facts,
    unequal,
)
from smalti.sampling import SamplingConfig

NETWORK = NetworkIdentity("inception", "a" * 64, "299, bilinear as TensorFlow 1")
RULES = (MetricRule("fid", "float64"), MetricRule("inception_score", "splits of 5000", uses_reference=False))
WHOLE = {
    "count": 50_000,
    "image_size": (256, 256),
    "class_labels": "random",
    "sampling": sampling_facts(SamplingConfig(guidance_scale=1.5), flow=False, learned_variance=True),
    "ema": True,
    "precision": "fp32",
    "inference": "none",
    "decoder": "ft-EMA",
    "network": NETWORK,
    "reference": Reference("imagenet", "b" * 64, 10_000),
    "metrics": RULES,
    "smalti": "0.1.0",
}


def protocol(**changes):
    return Protocol(**WHOLE | changes)


def sampled(**settings):
    return sampling_facts(SamplingConfig(**settings), flow=False, learned_variance=True)


def test_a_protocol_equals_itself_and_its_digest_survives_a_file():
    a = protocol()
    again = from_dict(Protocol, to_dict(a))
    assert differences(a, again) == []
    assert a.digest == again.digest
    assert len(a.digest) == 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 10_000}, "count: 50000 here, 10000 there"),
        ({"image_size": (256, 512)}, "image_size: [256, 256] here, [256, 512] there"),
        ({"class_labels": "balanced"}, "class_labels: random here, balanced there"),
        ({"sampling": sampled(guidance_scale=4.0)}, "sampling.guidance_scale: 1.5 here, 4.0 there"),
        (
            {"sampling": sampled(guidance_scale=1.5, guidance_channels=3)},
            "sampling.guidance_channels: all here, 3 there",
        ),
        ({"ema": False}, "ema: yes here, no there"),
        ({"precision": "bf16"}, "precision: fp32 here, bf16 there"),
        ({"inference": "eager"}, "inference: none here, eager there"),
        ({"decoder": "ft-MSE"}, "decoder: ft-EMA here, ft-MSE there"),
        (
            {"network": dataclasses.replace(NETWORK, weights="c" * 64)},
            "network.weights: aaaaaaaaaaaa here, cccccccccccc there",
        ),
        ({"network": dataclasses.replace(NETWORK, numerics="bf16")}, "network.numerics: float32 on cpu here, bf16"),
        ({"reference": Reference("imagenet", "b" * 64, 50_000)}, "reference.count: 10000 here, 50000 there"),
        ({"metrics": (MetricRule("fid", "float32"), RULES[1])}, "metrics.fid: float64 here, float32 there"),
        ({"smalti": "0.2.0"}, "smalti: 0.1.0 here, 0.2.0 there"),
    ],
)
def test_each_part_that_differs_is_named_once_with_both_values(changes, said):
    a, b = protocol(), protocol(**changes)
    (found,) = differences(a, b, "fid")
    assert found.startswith(said)
    assert a.digest != b.digest
    assert a.column_digest("fid") != b.column_digest("fid")


def test_every_field_bears_on_the_digest_and_is_compared():
    """A new field cannot be forgotten: as unknown it must be told as a difference."""
    names = {field.name for field in dataclasses.fields(Protocol)} - {"metrics", "real"}
    assert names == set(WHOLE) - {"metrics"}
    for name in names:
        b = protocol(**{name: None})
        assert protocol().digest != b.digest
        assert [d.name for d in unequal(protocol(), b, "fid")] == [name]


def test_two_hashes_that_begin_alike_are_still_two():
    b = protocol(network=dataclasses.replace(NETWORK, weights="a" * 63 + "b"))
    assert len(differences(protocol(), b)) == 1


def test_what_does_not_bear_on_a_metric_keeps_no_numbers_of_it_apart():
    other_rule = protocol(metrics=(RULES[0], MetricRule("inception_score", "splits of 10", uses_reference=False)))
    assert differences(protocol(), other_rule, "fid") == []
    assert protocol().column_digest("fid") == other_rule.column_digest("fid")
    assert len(differences(protocol(), other_rule, "inception_score")) == 1

    renamed = protocol(reference=dataclasses.replace(protocol().reference, name="the same under another name"))
    assert unequal(protocol(), renamed) == []
    assert protocol().digest == renamed.digest
    other_reference = protocol(reference=Reference("faces", "c" * 64, 70_000))
    assert differences(protocol(), other_reference, "inception_score") == []
    assert [d.name for d in unequal(protocol(), other_reference, "fid")] == [
        "reference.digest",
        "reference.count",
    ]


@pytest.mark.parametrize("name", ["count", "sampling", "reference", "decoder"])
def test_unknown_equals_nothing_not_even_unknown(name):
    a, b = protocol(**{name: None}), protocol(**{name: None})
    (found,) = unequal(a, b, "fid")
    assert str(found) == f"{name}: unknown here, unknown there"
    assert found.allowed_by(["unknown"])
    (found,) = unequal(a, protocol(), "fid")
    assert found.here == "unknown"
    assert found.there != "unknown"
    assert found.allowed_by([name])
    assert not found.allowed_by(["guidance_scale"])


DRAWN = ("class_labels", "sampling", "ema", "precision", "inference", "decoder")


def test_real_images_are_kept_apart_by_nothing_about_drawing_and_by_everything_else():
    real = protocol(**dict.fromkeys(DRAWN), real=True)
    unknown = protocol(**dict.fromkeys(DRAWN))
    for drawn in (protocol(), unknown, real):
        assert unequal(real, drawn) == unequal(drawn, real) == []
    assert len({real.digest, unknown.digest, protocol().digest}) == 3
    for name in set(WHOLE) - set(DRAWN) - {"metrics"}:
        assert [d.name for d in unequal(real, protocol(**{name: None}), "fid")] == [name]
    assert from_dict(Protocol, to_dict(real)) == real
    assert from_dict(Protocol, {k: v for k, v in to_dict(unknown).items() if k != "real"}) == unknown


@pytest.mark.parametrize("name", DRAWN)
def test_images_that_were_drawn_are_not_called_real(name):
    with pytest.raises(ConfigError, match=f"real images were not drawn, and these have {name}"):
        protocol(**dict.fromkeys(set(DRAWN) - {name}), real=True)


def test_an_unknown_setting_inside_a_group_is_said_alone():
    a = protocol(reference=Reference("stats.npz", "b" * 64))
    assert differences(a, a, "fid") == ["reference.count: unknown here, unknown there"]


def test_a_difference_is_waived_by_its_name_its_last_part_or_its_group():
    (found,) = unequal(protocol(), protocol(sampling=sampled(guidance_scale=4.0)))
    for name in ("guidance_scale", "sampling.guidance_scale", "sampling"):
        assert found.allowed_by([name])
    for name in ("unknown", "num_inference_steps", "sampling.eta", ""):
        assert not found.allowed_by([name])


def test_settings_without_effect_are_no_part_of_the_protocol():
    assert sampled(guidance_channels=3, guidance_interval=(0.1, 0.9)) == sampled()
    assert sampled(shift=3.0) == sampled()
    assert sampled(fixed_variance="small") == sampled()
    assert sampled(spacing="respaced") == sampled()
    assert "eta" not in sampled()
    assert sampled(sampler="ddim", eta=0.5)["eta"] == 0.5
    assert sampled(guidance_scale=2) == sampled(guidance_scale=2.0)
    flow = sampling_facts(SamplingConfig(sampler="ddim", shift=3.0), flow=True, learned_variance=False)
    assert (flow["shift"], flow["spacing"]) == (3.0, "uniform")
    plain = sampling_facts(SamplingConfig(fixed_variance="small"), flow=False, learned_variance=False)
    assert plain["fixed_variance"] == "small"


def test_what_only_one_of_two_samplers_has_does_not_apply_to_the_other():
    a, b = protocol(sampling=sampled(sampler="ddim", eta=0.5)), protocol(sampling=sampled())
    assert "sampling.eta: 0.5 here, does not apply there" in differences(a, b)


def test_names_to_waive_are_checked():
    check_allowed(["unknown", "guidance_scale", "sampling.eta", "network", "weights", "metrics.fid", "ema"])
    with pytest.raises(ConfigError, match="--allow guidance: no protocol has such a part; did you mean 'guidance_sc"):
        check_allowed(["guidance"])


def test_a_protocol_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="one rule for each metric, got fid, fid"):
        protocol(metrics=(RULES[0], RULES[0]))
    with pytest.raises(ConfigError, match="sampling"):
        protocol(sampling={"eta": float("nan")})
    with pytest.raises(ConfigError, match="no metric 'kid'"):
        protocol().parts("kid")


def test_later_changes_of_a_callers_dict_do_not_reach_a_protocol():
    facts = sampled()
    a = protocol(sampling=facts)
    facts["eta"] = 1.0
    assert "eta" not in a.sampling


def test_rules_come_from_the_table_of_metrics():
    table = {
        "x": Metric("X", "lower", ("pool",), "nothing", lambda *_: {}, "as x"),
        "y": Metric("Y", "lower", ("pool",), "moments", lambda *_: {}, "as y"),
    }
    assert rules_of(["y", "x"], table) == (MetricRule("y", "as y", True), MetricRule("x", "as x", False))
