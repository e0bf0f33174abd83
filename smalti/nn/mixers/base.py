"""The abstract mixer config: a field of this type is a choice between the entries of MIXERS."""

from dataclasses import dataclass

from smalti.config import Kinds


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Kinds):
    """How tokens see each other."""

    @classmethod
    def kinds(cls) -> dict[str, type]:
        from smalti.nn.mixers import MIXERS  # here, because the table imports every member and each imports this file

        return {kind: config for kind, (config, _) in MIXERS.items()}
