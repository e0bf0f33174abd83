"""How a number was made. Two numbers may stand in one column only if their protocols agree in what bears on them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from smalti.config import did_you_mean, to_dict
from smalti.errors import ConfigError
from smalti.evaluation.features import NetworkIdentity
from smalti.evaluation.metric import Metric
from smalti.sampling import SAMPLERS, SamplingConfig

# What `--allow` takes beside the names of parts: whatever is not known on one side or the other.
UNKNOWN = "unknown"
SHOWN = 12  # digits of a digest that people see
_GROUPS = ("sampling", "network", "reference")
_DRAWN = ("class_labels", "sampling", "ema", "precision", "inference", "decoder")  # facts of a model's images
_ABSENT = object()


@dataclass(frozen=True)
class Reference:
    """The real images, or the statistics of them, that a set was compared with.

    Attributes:
        name: as people know it: a file's or an image set's name.
        digest: SHA-256 of what was compared with.
        count: images behind it; None where its file does not say.
    """

    name: str
    digest: str
    count: int | None = None


@dataclass(frozen=True)
class MetricRule:
    """A metric as it was computed.

    Attributes:
        name: its key in `METRICS`.
        definition: constants and rules that change the number.
        uses_reference: False for numbers that look at one set of images only.
    """

    name: str
    definition: str
    uses_reference: bool = True


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that must agree before two numbers can be compared. None is "unknown", and equals nothing.

    Which model it is, and where and how long it ran, are facts of a result and not of its protocol.

    Attributes:
        count: images that were looked at.
        image_size: rows and columns.
        class_labels: random (uniform, from each seed), balanced, given (named by the user) or unconditional.
        sampling: from `sampling_facts`; a setting that has no effect is left out.
        ema: whether the averaged weights drew them.
        precision: of the network while sampling: fp32, bf16.
        inference: the network's form while sampling: none, eager, frozen.
        decoder: what turned latents into pixels; "pixels" where there are no latents.
        network: the feature network.
        reference: None where it is unknown or where no metric has one.
        metrics: one rule a metric.
        smalti: version of the code, `smalti.__version__`.
        real: these are real images, of a data set. How images are drawn, from class_labels to decoder, does not apply
            to them and keeps them apart from no other images: the distance between both is what metrics are for.

    Raises:
        ConfigError: two rules of one name, a setting that JSON cannot hold, or real images that were drawn.
    """

    count: int | None = None
    image_size: tuple[int, int] | None = None
    class_labels: Literal["random", "balanced", "given", "unconditional"] | None = None
    sampling: dict | None = None
    ema: bool | None = None
    precision: str | None = None
    inference: str | None = None
    decoder: str | None = None
    network: NetworkIdentity | None = None
    reference: Reference | None = None
    metrics: tuple[MetricRule, ...] = ()
    smalti: str | None = None
    real: bool = False

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.metrics]
        if len(set(names)) < len(names):
            raise ConfigError(f"a protocol has one rule for each metric, got {', '.join(names)}")
        if self.real and (drawn := [name for name in _DRAWN if getattr(self, name) is not None]):
            raise ConfigError(
                f"real images were not drawn, and these have {', '.join(drawn)}; leave one or the other out"
            )
        object.__setattr__(self, "sampling", as_json_has_it(self.sampling, "sampling"))

    @property
    def digest(self) -> str:
        """SHA-256 of everything here; the first twelve digits are what people see."""
        return _digest(self.parts())

    def parts(self, metric: str | None = None) -> dict[str, Any]:
        """Dotted name -> value of what bears on one metric, or of everything.

        Raises:
            ConfigError: this protocol has no such metric.
        """
        rules = self.metrics if metric is None else (self._rule(metric),)
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "real" or (self.real and field.name in _DRAWN):
                continue
            if field.name == "metrics":
                found |= {f"metrics.{rule.name}": rule.definition for rule in rules}
            elif field.name == "reference" and not any(rule.uses_reference for rule in rules):
                continue
            elif field.name in _GROUPS and value is not None:
                # What the reference is called is for people: its digest says whether it is the same.
                inside = {n: v for n, v in to_dict(value).items() if (field.name, n) != ("reference", "name")}
                found |= {f"{field.name}.{name}": inner for name, inner in inside.items()}
            else:
                found[field.name] = to_dict(value)
        return found

    def column_digest(self, metric: str) -> str:
        """SHA-256 of what bears on one metric: equal for numbers that may stand in one column, if all is known.

        Real images have another one than drawn images, in whose column they may stand.
        """
        return _digest(self.parts(metric))

    def _rule(self, metric: str) -> MetricRule:
        names = [rule.name for rule in self.metrics]
        if metric not in names:
            raise ConfigError(f"this protocol has no metric {metric!r}{did_you_mean(metric, names)}")
        return self.metrics[names.index(metric)]


@dataclass(frozen=True)
class Difference:
    """A part in which two protocols are not known to be the same.

    Attributes:
        here, there: as people read them: a number, "unknown", or "does not apply".
    """

    name: str
    here: str
    there: str

    def __str__(self) -> str:
        return self.between("here", "there")

    def between(self, here: str, there: str) -> str:
        """The same with the names of the two."""
        return f"{self.name}: {self.here} {here}, {self.there} {there}"

    def allowed_by(self, allow: Iterable[str]) -> bool:
        """Whether one of these names waives it: its own, the last part of it, its group, or "unknown"."""
        group, _, last = self.name.partition(".")
        names = {self.name, group, last} | ({UNKNOWN} if UNKNOWN in (self.here, self.there) else set())
        return not names.isdisjoint(allow)


def unequal(a: Protocol, b: Protocol, metric: str | None = None) -> list[Difference]:
    """Where two protocols are not known to agree, in what bears on one metric, or in everything.

    An unknown part equals nothing, not even another unknown one. Beside real images, it does not matter how the others
    were drawn.

    Raises:
        ConfigError: one of the two has no such metric.
    """
    ours, theirs = a.parts(metric), b.parts(metric)
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        group = name.partition(".")[0]
        if group in _DRAWN and (a.real or b.real):
            continue
        # One side knows nothing of the group: that is said once, for the group.
        if name != group and (group in ours or group in theirs):
            continue
        here, there = ours.get(name, _ABSENT), theirs.get(name, _ABSENT)
        if here != there or here is None:
            found.append(Difference(name, _told(name, ours), _told(name, theirs)))
    return found


def differences(a: Protocol, b: Protocol, metric: str | None = None) -> list[str]:
    """`unequal` in words: "sampling.guidance_scale: 1.5 here, 4.0 there".

    Raises:
        ConfigError: one of the two has no such metric.
    """
    return [str(difference) for difference in unequal(a, b, metric)]


def check_allowed(allow: Iterable[str]) -> None:
    """Refuse names of parts that no protocol has.

    Raises:
        ConfigError: one of them.
    """
    inside = {
        "sampling": [field.name for field in dataclasses.fields(SamplingConfig)],
        "network": [field.name for field in dataclasses.fields(NetworkIdentity)],
        "reference": [field.name for field in dataclasses.fields(Reference) if field.name != "name"],
    }
    known = [UNKNOWN, *(field.name for field in dataclasses.fields(Protocol) if field.name != "real")]
    known += [spelling for group, names in inside.items() for n in names for spelling in (n, f"{group}.{n}")]
    for name in allow:
        if name not in known and not name.startswith("metrics."):
            raise ConfigError(f"--allow {name}: no protocol has such a part{did_you_mean(name, known)}")


def sampling_facts(config: SamplingConfig, *, flow: bool, learned_variance: bool) -> dict[str, Any]:
    """The settings of sampling that have an effect, so that those without one keep no two numbers apart.

    Args:
        flow: the network was trained on the flow path.
        learned_variance: it says itself how noisy ancestral steps are.
    """
    facts = {
        field.name: float(value) if isinstance(field.default, float) else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }
    if config.spacing == "default":
        facts["spacing"] = "uniform" if flow else "respaced"
    idle = {option for sampler in SAMPLERS.values() for option in sampler.options}
    idle -= set(SAMPLERS[config.sampler].options)
    if learned_variance:
        idle.add("fixed_variance")
    if not flow:
        idle.add("shift")
    if config.guidance_scale == 1:
        idle |= {"guidance_interval", "guidance_channels"}
    return {name: value for name, value in facts.items() if name not in idle}


def rules_of(names: Iterable[str], table: Mapping[str, Metric]) -> tuple[MetricRule, ...]:
    """The rules of some metrics of a table, usually `METRICS`, for a protocol."""
    return tuple(MetricRule(n, table[n].definition, table[n].reference != "nothing") for n in names)


def as_json_has_it(facts: dict | None, where: str) -> dict | None:
    """Plain facts as a file will hold them: lists for tuples, and a copy, so that nobody changes them later.

    Raises:
        ConfigError: a value that JSON does not have, such as NaN.
    """
    try:
        return json.loads(json.dumps(facts, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}; give text, finite numbers, lists and tables of them") from error


def _told(name: str, parts: Mapping[str, Any]) -> str:
    if name in parts:
        return told(parts[name])
    return "known" if any(other.startswith(name + ".") for other in parts) else "does not apply"


def told(value: Any) -> str:
    """A part of a protocol as people read it."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:SHOWN]
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def _digest(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
