"""state-spaces/s4: its diagonal layers, which become a mixer. Source: key names and shapes of models/s4 of that code.

"state-spaces/s4" is its `S4Block` (s4.py); where the hyper-parameter `bidirectional` is not given, it is the short
`S4D` (s4d.py), which does not know it, as "state-spaces/s4d" always is. `transposed` tells how theirs is called; the
mixer always takes tokens before channels.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from smalti.checkpoints.keymap import KeyMap
from smalti.checkpoints.maps.base import Source, Translation
from smalti.errors import ConfigError
from smalti.nn.mixers import BiSSMConfig, MixerConfig, build_mixer

_INITS = {"diag": "lin", "diag-lin": "lin", "diag-inv": "inv", "diag-legs": "legs"}
_row = Translation(lambda t: t[None], lambda t: t[0])  # our parameters have a row for each direction


def _build(config: MixerConfig, values: Mapping[str, Any]) -> nn.Module:
    if values["d_model"] < 1:
        raise ConfigError(f"d_model {values['d_model']} must be at least 1")
    return build_mixer(config, values["d_model"])


def _s4_config(h: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BiSSMConfig:
    if h["init"] not in _INITS or h["disc"] not in ("zoh", "bilinear"):
        raise ConfigError(
            f"init {h['init']!r} with disc {h['disc']!r}: expected one of {', '.join(_INITS)}, and zoh or bilinear"
        )
    return BiSSMConfig(
        state_size=h["d_state"],
        init=_INITS[h["init"]],  # type: ignore[arg-type]
        discretization=h["disc"],
        bidirectional=h["bidirectional"],
        shared_dynamics=h["bidirectional"],
        output="glu",
    )


def _s4d_config(h: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BiSSMConfig:
    return BiSSMConfig(state_size=h["d_state"], bidirectional=False, trained_input=False, output="glu")


def _unreleased(config: Any) -> str:
    """Both released layers end with a gated linear layer behind a GELU, and share the dynamics of two directions."""
    expected = {"activation": "gelu", "output": "glu", "directions": "sum", "shared_dynamics": config.bidirectional}
    odd = [f"{name}={getattr(config, name)!r}" for name, value in expected.items() if getattr(config, name) != value]
    return ", ".join(odd)


S4D = Source(
    name="state-spaces/s4d",
    kind=BiSSMConfig.kind,
    hyperparameters={"d_model": int, "d_state": int, "transposed": bool},
    defaults={"d_state": 64, "transposed": True},
    keys=KeyMap(
        {
            "kernel.log_dt": "log_dt",
            "kernel.log_A_real": "log_decay",
            "kernel.A_imag": "frequency",
            "kernel.C": "output_vector",
            "D": "skip",
            "output_linear.0": "out",
        }
    ),
    config=_s4d_config,
    build=_build,
    unreleased=lambda config: _unreleased(config) or ("bilinear" if config.discretization != "zoh" else ""),
    translations={
        "log_dt": _row,
        "log_decay": _row,
        "frequency": _row,
        "output_vector": _row,
        "out.weight": Translation(lambda t: t[:, :, 0], lambda t: t[:, :, None]),  # a convolution over single tokens
    },
)

S4 = Source(
    name="state-spaces/s4",
    kind=BiSSMConfig.kind,
    hyperparameters={
        "d_model": int,
        "d_state": int,
        "bidirectional": bool,
        "transposed": bool,
        "disc": str,
        "init": str,
    },
    defaults={"d_state": 64, "transposed": True, "disc": "zoh", "init": "diag-lin"},
    keys=KeyMap(
        {
            "layer.kernel.inv_dt": "log_dt",
            "layer.kernel.A_real": "log_decay",
            "layer.kernel.A_imag": "frequency",
            "layer.kernel.B": "input_vector",
            "layer.kernel.C": "output_vector",
            "layer.D": "skip",
            "output_linear.0": "out",
        }
    ),
    config=_s4_config,
    build=_build,
    unreleased=_unreleased,
    translations={
        "log_dt": Translation(lambda t: t.mT, lambda t: t.mT),
        "log_decay": _row,
        # Theirs are the other halves of the conjugate pairs: A = -exp(A_real) - i A_imag.
        "frequency": Translation(lambda t: -t[None], lambda t: -t[0]),
        "skip": Translation(lambda t: t[0], lambda t: t[None]),
    },
    variant=lambda given: None if "bidirectional" in given else S4D,
)
