"""smalti: diffusion backbones, each exact to its paper, and one shared set of everything else.

The public names below are imported on first use, so that `import smalti` is quick and touches nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "SmaltiError": "smalti.errors",
    "create_model": "smalti.presets",
    "from_official": "smalti.checkpoints",
    "from_pretrained": "smalti.models.pretrained",
    "list_models": "smalti.presets",
    "load_model": "smalti.checkpoints",
    "save_model": "smalti.checkpoints",
}

if TYPE_CHECKING:
    from smalti.checkpoints import from_official, load_model, save_model
    from smalti.errors import SmaltiError
    from smalti.models.pretrained import from_pretrained
    from smalti.presets import create_model, list_models


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smalti' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "SmaltiError",
    "__version__",
    "create_model",
    "from_official",
    "from_pretrained",
    "list_models",
    "load_model",
    "save_model",
]
