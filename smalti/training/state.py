"""Everything that changes during a run, to and from a checkpoint. Random state is not among it: it is counters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smalti.checkpoints.shards import StoredCheckpoint
from smalti.errors import CheckpointError
from smalti.training.ema import EMA


@dataclass
class TrainState:
    """Network, average, optimizer and counters of a run.

    Args:
        step: optimizer steps done, skipped ones included.
        skipped: steps whose loss or gradient was not finite, most recent last.
    """

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.AdamW
    step: int = 0
    skipped: tuple[int, ...] = ()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups of named tensors, as `CheckpointStore.save` takes them."""
        names = self._parameter_names()
        optimizer = {
            f"{name}.{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
            for name in [names[parameter]]
        }
        return {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(), "optimizer": optimizer}

    def counters(self) -> dict[str, Any]:
        """The rest of the state, in JSON types."""
        return {"step": self.step, "skipped": list(self.skipped)}

    def restore(self, stored: StoredCheckpoint) -> None:
        """Become what was stored.

        Raises:
            CheckpointError: the checkpoint belongs to another network.
        """
        try:
            self.model.load_state_dict(stored.tensors["model"])
            self.ema.model.load_state_dict(stored.tensors["ema"])
            optimizer = stored.tensors["optimizer"]
            step, skipped = int(stored.state["step"]), tuple(stored.state["skipped"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{stored.path} is a checkpoint of another model: {_one_line(error)}") from error
        names = {name: parameter for parameter, name in self._parameter_names().items()}
        states: dict[Tensor, dict[str, Tensor]] = {}
        for full_name, value in optimizer.items():
            name, key = full_name.rsplit(".", 1)
            if name not in names:
                raise CheckpointError(f"{stored.path}: optimizer state of an unknown parameter {name!r}")
            target = names[name]
            # Only the fused kernel counts its steps on the device.
            device = target.device if key != "step" or self.optimizer.defaults["fused"] else torch.device("cpu")
            states.setdefault(target, {})[key] = value.to(device)
        self.optimizer.state.clear()
        self.optimizer.state.update(states)
        self.step, self.skipped = step, skipped

    def _parameter_names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
