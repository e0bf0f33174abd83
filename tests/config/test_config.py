"""Configs to plain data and back: nothing is lost, nothing is bent, and a slip is answered with a suggestion."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest

from smalti.config import Kinds, did_you_mean, from_dict, replace, to_dict
from smalti.errors import ConfigError, SmaltiError


@dataclass(frozen=True, kw_only=True)
class Shape(Kinds):
    @classmethod
    def kinds(cls):
        return {"circle": Circle, "square": Square}


@dataclass(frozen=True, kw_only=True)
class Circle(Shape):
    kind: ClassVar[str] = "circle"
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    kind: ClassVar[str] = "square"
    side: float


@dataclass(frozen=True)
class Inner:
    count: int = 3


@dataclass(frozen=True)
class Other:
    weight: float


@dataclass(frozen=True)
class Config:
    name: str
    shape: Shape
    size: tuple[int, int] = (1, 2)
    ids: tuple[int, ...] = ()
    names: list[str] = field(default_factory=list)
    rate: float = 0.5
    limit: float | None = None
    on: bool = True
    mode: Literal["slow", "fast"] = "slow"
    channels: Literal["all"] | int = "all"
    either: Inner | Other = Inner()
    out: Path = Path("here")
    inner: Inner = Inner()
    noted: Annotated[int, "a remark for the command line"] = 1
    anything: Any = None
    shapes: tuple[Shape, ...] = ()


CONFIGS = [
    Config("plain", Circle()),
    Config("nested", Square(side=2.0), inner=Inner(7), shapes=(Circle(radius=3.0), Square(side=4.0))),
    Config("sequences", Circle(), size=(5, 6), ids=(1, 2, 3), names=["a", "b"]),
    Config("choices", Circle(), limit=0.1, on=False, mode="fast", channels=3, either=Other(2.0), out=Path("a/b")),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_a_config_comes_back_equal_through_json(config):
    again = from_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert [type(v) for v in vars(again).values()] == [type(v) for v in vars(config).values()]


def test_files_contain_the_kind_and_never_a_class_name():
    data = to_dict(Config("x", Square(side=2.0)))
    assert data["shape"] == {"kind": "square", "side": 2.0}
    assert "Square" not in json.dumps(data)
    assert data["out"] == "here"
    assert data["size"] == [1, 2]


def test_defaults_fill_what_the_data_leave_out():
    assert from_dict(Config, {"name": "x", "shape": {"kind": "circle"}}) == Config("x", Circle())


def test_reading_leaves_the_data_as_they_were():
    data = {"name": "x", "shape": {"kind": "circle", "radius": 2}}
    from_dict(Config, data)
    assert data == {"name": "x", "shape": {"kind": "circle", "radius": 2}}


def test_whole_numbers_become_floats_where_floats_are_asked_for():
    config = from_dict(Config, {"name": "x", "shape": {"kind": "circle", "radius": 2}, "limit": 3})
    assert (config.shape.radius, config.limit) == (2.0, 3.0)
    assert isinstance(config.shape.radius, float)
    assert isinstance(config.limit, float)


def test_configs_that_are_already_built_are_taken_as_they_are():
    shape = Square(side=1.0)
    assert from_dict(Config, {"name": "x", "shape": shape}).shape is shape


GOOD = {"name": "x", "shape": {"kind": "circle"}}
REFUSED = [
    ([1], "config: expected a table of settings, got [1]"),
    ({"shape": {"kind": "circle"}}, "config: missing setting 'name'"),
    (GOOD | {"raet": 1.0}, "config: unknown setting 'raet'; did you mean 'rate'?"),
    (GOOD | {3: 1.0}, "config: unknown setting 3"),
    (GOOD | {"inner": {"cuont": 1}}, "config.inner: unknown setting 'cuont'; did you mean 'count'?"),
    (GOOD | {"inner": 4}, "config.inner: expected a table of settings, got 4"),
    (GOOD | {"name": 4}, "config.name: expected str, got 4"),
    (GOOD | {"name": None}, "config.name: expected str, got None"),
    (GOOD | {"on": 1}, "config.on: expected bool, got 1"),
    (GOOD | {"inner": {"count": True}}, "config.inner.count: expected int, got True"),
    (GOOD | {"inner": {"count": 3.0}}, "config.inner.count: expected int, got 3.0"),
    (GOOD | {"inner": {"count": "3"}}, "config.inner.count: expected int, got '3'"),
    (GOOD | {"rate": True}, "config.rate: expected float, got True"),
    (GOOD | {"rate": "fast"}, "config.rate: expected float, got 'fast'"),
    (GOOD | {"rate": "1e-4"}, "config.rate: expected float, got '1e-4'; YAML reads 1e-4 as text: write 1.0e-4"),
    (GOOD | {"limit": "2e5"}, "config.limit: expected float or nothing, got '2e5'; YAML reads 1e-4 as text"),
    (GOOD | {"limit": "x"}, "config.limit: expected float or nothing, got 'x'"),
    (GOOD | {"size": 3}, "config.size: expected a list, got 3"),
    (GOOD | {"size": [1]}, "config.size: expected 2 values, got 1: [1]"),
    (GOOD | {"size": [1, "b"]}, "config.size[1]: expected int, got 'b'"),
    (GOOD | {"ids": [1, 2.5]}, "config.ids[1]: expected int, got 2.5"),
    (GOOD | {"names": "abc"}, "config.names: expected a list, got 'abc'"),
    (GOOD | {"mode": "fsat"}, "config.mode: got 'fsat'; did you mean 'fast'?"),
    (GOOD | {"mode": 7}, "config.mode: got 7; choose from slow, fast"),
    (GOOD | {"channels": "al"}, "config.channels: expected 'all' or int, got 'al'"),
    (GOOD | {"either": {"weihgt": 2.0}}, "config.either: unknown setting 'weihgt'"),
    (GOOD | {"either": 5}, "config.either: expected Inner or Other, got 5"),
    (GOOD | {"out": 5}, "config.out: expected Path, got 5"),
    (GOOD | {"shape": {}}, "config.shape: missing 'kind'; choose from circle, square"),
    (GOOD | {"shape": {"kind": "cirle"}}, "config.shape: unknown kind 'cirle'; did you mean 'circle'?"),
    (GOOD | {"shape": {"kind": ["circle"]}}, "config.shape: unknown kind ['circle']"),
    (GOOD | {"shape": {"kind": "square"}}, "config.shape: missing setting 'side'"),
    (GOOD | {"shape": {"kind": "square", "side": 1, "radius": 1}}, "config.shape: unknown setting 'radius'"),
    (GOOD | {"shapes": [{"kind": "circle"}, {"kind": "dot"}]}, "config.shapes[1]: unknown kind 'dot'"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_wrong_data_are_refused_in_one_line_that_names_the_place(data, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, data)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_true_is_no_choice_where_one_is():
    @dataclass(frozen=True)
    class Numbered:
        level: Literal[1, 2] = 1

    assert from_dict(Numbered, {"level": 2}).level == 2
    with pytest.raises(ConfigError, match=r"config\.level: got True"):
        from_dict(Numbered, {"level": True})


def test_a_member_reads_its_own_kind_only():
    assert from_dict(Circle, {"radius": 2.0}) == from_dict(Circle, {"kind": "circle", "radius": 2.0})
    with pytest.raises(ConfigError, match="unknown kind 'square'"):
        from_dict(Circle, {"kind": "square", "side": 1.0})


def test_a_config_s_own_rules_hold_for_data_too():
    @dataclass(frozen=True)
    class Positive:
        count: int

        def __post_init__(self):
            if self.count < 1:
                raise ConfigError(f"count must be at least 1, got {self.count}")

    with pytest.raises(ConfigError, match="at least 1, got 0"):
        from_dict(Positive, {"count": 0})
    with pytest.raises(ConfigError, match="at least 1, got -1"):
        replace(Positive(1), count=-1)


def test_replace_reads_values_as_strictly_as_a_file():
    config = Config("x", Circle())
    changed = replace(config, rate=1, size=[3, 4], shape={"kind": "square", "side": 2}, limit=None)
    assert changed == dataclasses.replace(config, rate=1.0, size=(3, 4), shape=Square(side=2.0))
    assert config == Config("x", Circle())
    with pytest.raises(ConfigError, match=r"override: unknown setting 'siez'; did you mean 'size'\?"):
        replace(config, siez=(1, 2))
    with pytest.raises(ConfigError, match=r"--rate rate: expected float, got 'x'"):
        replace(config, where="--rate", rate="x")


def test_replace_with_nothing_is_the_same_config():
    assert replace(CONFIGS[1]) == CONFIGS[1]


def test_suggestions_name_the_closest_else_all():
    assert did_you_mean("dpm-solver", ["ddim", "dpm-solver++"]) == "; did you mean 'dpm-solver++'?"
    assert did_you_mean("zzz", ["ddim", "heun"]) == "; choose from ddim, heun"
    assert did_you_mean("zzz", []) == "; choose from nothing: none exist"


def test_an_abstract_config_without_a_table_says_whose_it_is():
    class Untabled(Kinds):
        pass

    with pytest.raises(NotImplementedError, match="Untabled has no table of kinds"):
        from_dict(Untabled, {"kind": "x"})


def test_a_config_error_is_a_value_error_and_has_the_exit_code_of_wrong_usage():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, SmaltiError)
    assert ConfigError.exit_code == 64
