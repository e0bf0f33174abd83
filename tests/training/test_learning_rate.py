import math
import random

import pytest

from smalti.errors import ConfigError
from smalti.training.config import OptimizerConfig
from smalti.training.optim import learning_rate


def test_a_constant_rate_without_warm_up_is_the_peak_from_the_first_step():
    config = OptimizerConfig(learning_rate=3e-4)
    assert [learning_rate(config, step, 100) for step in (0, 1, 50, 99)] == [3e-4] * 4


def test_the_warm_up_rises_by_equal_parts_and_reaches_the_peak_after_its_steps():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])


def test_the_cosine_falls_from_the_peak_after_the_warm_up_to_zero_at_the_end():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, decay="cosine")
    assert learning_rate(config, 10, 110) == 1.0
    assert learning_rate(config, 60, 110) == pytest.approx(0.5)
    assert learning_rate(config, 35, 110) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert learning_rate(config, 110, 110) == pytest.approx(0, abs=1e-15)
    assert 0 < learning_rate(config, 109, 110) < 1e-3
    after = [learning_rate(config, step, 110) for step in range(10, 111)]
    assert after == sorted(after, reverse=True)


def test_a_warm_up_longer_than_the_run_ends_below_the_peak_and_divides_by_nothing():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=99, decay="cosine")
    assert [learning_rate(config, step, 10) for step in (0, 9)] == pytest.approx([0.01, 0.1])


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_rate_is_a_function_of_the_step_alone(decay):
    config = OptimizerConfig(warmup_steps=5, decay=decay)
    steps = list(range(50))
    in_order = [learning_rate(config, step, 50) for step in steps]
    random.Random(0).shuffle(steps)
    assert {step: learning_rate(config, step, 50) for step in steps} == dict(enumerate(in_order))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be in"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"warmup_steps": -1}, "0 or more"),
        ({"weight_decay": -0.1}, "0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        OptimizerConfig(**changes)
