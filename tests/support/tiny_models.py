"""Networks of some thousand weights that make images of 8 by 8 pixels, each seed another one."""

from pathlib import Path

from tiny_runs import scramble

from smalti.checkpoints import save_model
from smalti.presets import create_model

CLASSES = tuple(f"class {number}" for number in range(10))


def write_tiny_model(folder: Path, *, seed: int = 0, **changes) -> Path:
    """A model folder; the network predicts x0, so that images of random weights are not all black and white."""
    small = {"depth": 1, "hidden_size": 16, "num_heads": 2, "sample_size": (8, 8), "num_classes": 10}
    model = create_model("dit-emoji32", **(small | {"learned_variance": False} | changes))
    scramble(model, seed)
    return save_model(folder, model, extra={"objective": {"prediction": "x0"}, "class_names": list(CLASSES)})
