"""Another mixer in the same network: the comparison in which nothing else differs."""

import dataclasses

from smalti.config import did_you_mean
from smalti.errors import ConfigError
from smalti.models import BackboneConfig
from smalti.nn.mixers import MIXERS, MixerConfig

HEAD_SIZE = 64  # of most published attention; for a mixer with heads in a network that has none


def swap_mixer(config: BackboneConfig, kind: str) -> BackboneConfig:
    """The same network with another kind of mixer in its default form; with its own kind it stays as it is.

    A setting without a default is taken from the present mixer, such as the number of heads.

    Raises:
        ConfigError: no such mixer, a network without mixers, a setting that nothing tells, or a combination that the
            backbone refuses.
    """
    mixer = getattr(config, "mixer", None)
    if kind not in MIXERS:
        raise ConfigError(f"no mixer {kind!r}{did_you_mean(kind, MIXERS)}")
    if not isinstance(mixer, MixerConfig):
        raise ConfigError(f"backbone {config.kind!r} has no mixer to exchange")
    if mixer.kind == kind:
        return config
    wanted = MIXERS[kind][0]
    known = {"num_heads": max(1, getattr(config, "hidden_size", HEAD_SIZE) // HEAD_SIZE)} | vars(mixer)
    values = {}
    for field in dataclasses.fields(wanted):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if field.name not in known:
                raise ConfigError(f"mixer {kind!r} needs {field.name!r}: set the whole mixer with --override")
            values[field.name] = known[field.name]
    return dataclasses.replace(config, mixer=wanted(**values))  # type: ignore[call-arg]
