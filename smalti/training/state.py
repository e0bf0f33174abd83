"""Everything that changes during a run, to and from a checkpoint. Random state is not among it: it is counters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smalti.checkpoints.shards import Piece, StoredCheckpoint
from smalti.errors import CheckpointError
from smalti.training.config import GuardConfig
from smalti.training.distributed import Engine, as_sharded, local_part, place_of
from smalti.training.ema import EMA
from smalti.training.guard import Guard


@dataclass
class TrainState:
    """Network, average, optimizer and counters of a run, or this process's part of them.

    Args:
        step: optimizer steps done, skipped ones included.
        guard: which steps changed no weight, and what decides about the next.
        engine: how batches reach the network; None = it is called as it is, by this process alone.
    """

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.AdamW
    step: int = 0
    guard: Guard = field(default_factory=lambda: Guard(GuardConfig()))
    engine: Engine = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.engine is None:
            self.engine = Engine(self.model)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Steps that changed no weight, most recent last."""
        return self.guard.skipped

    def groups(self) -> dict[str, dict[str, Tensor | Piece]]:
        """Named tensors, or the rows of them that this process holds, as `CheckpointStore.save` takes them."""
        return {group: {name: _piece(t) for name, t in members.items()} for group, members in self._tensors().items()}

    def counters(self) -> dict[str, Any]:
        """The rest of the state, in JSON types."""
        return {"step": self.step, **self.guard.counters()}

    def restore(self, stored: StoredCheckpoint) -> None:
        """Become what was stored, by however many processes that was; of tensors in parts, only the own are read.

        Raises:
            CheckpointError: the checkpoint belongs to another network.
        """
        try:
            step = int(stored.state["step"])
            for group in ("model", "ema", "optimizer"):
                stored.names(group)
            _refuse_another(self.model.state_dict(), stored, "model")
            _refuse_another(self.ema.model.state_dict(), stored, "ema")
            states = self._optimizer_state(stored)
            with torch.no_grad():
                for group, module in (("model", self.model), ("ema", self.ema.model)):
                    for name, tensor in module.state_dict().items():
                        _read_into(tensor, stored, group, name)
            self.guard.restore(stored.state)
        except KeyError as error:
            raise CheckpointError(f"{stored.path} is a checkpoint of another model: it lacks {error}") from error
        self.optimizer.state.clear()
        self.optimizer.state.update(states)
        self.step = step

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters().items()}
        optimizer = {
            f"{names[parameter]}.{key}": value
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        return {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(), "optimizer": optimizer}

    def _optimizer_state(self, stored: StoredCheckpoint) -> dict[Tensor, dict[str, Tensor]]:
        parameters = self._parameters()
        states: dict[Tensor, dict[str, Tensor]] = {}
        for full_name in stored.names("optimizer"):
            name, key = full_name.rsplit(".", 1)
            if name not in parameters:
                raise CheckpointError(f"{stored.path}: optimizer state of an unknown parameter {name!r}")
            parameter, shape = parameters[name], stored.shape("optimizer", full_name)
            if not shape:
                # Only the fused kernel counts its steps on the device.
                on_device = self.optimizer.defaults["fused"]
                value = stored.tensor("optimizer", full_name)
                states.setdefault(parameter, {})[key] = value.to(parameter.device) if on_device else value
                continue
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{stored.path}: optimizer state {full_name!r} is {list(shape)}, the parameter "
                    f"{list(parameter.shape)}"
                )
            value = torch.empty_like(parameter, dtype=stored.dtype("optimizer", full_name), requires_grad=False)
            _read_into(value, stored, "optimizer", full_name)
            states.setdefault(parameter, {})[key] = value
        return states

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def _piece(tensor: Tensor) -> Tensor | Piece:
    sharded = as_sharded(tensor)
    if sharded is None:
        return tensor.detach()
    rows, (start, writes) = local_part(tensor), place_of(sharded)
    return Piece(rows if writes else rows[:0], tuple(tensor.shape), start)


def _read_into(tensor: Tensor, stored: StoredCheckpoint, group: str, name: str) -> None:
    sharded = as_sharded(tensor)
    if sharded is None:
        tensor.detach().copy_(stored.tensor(group, name))
        return
    part, (start, _) = local_part(tensor), place_of(sharded)
    part.copy_(stored.rows(group, name, start, start + len(part)))


def _refuse_another(own: Mapping[str, Tensor], stored: StoredCheckpoint, group: str) -> None:
    there = {name: (stored.shape(group, name), stored.dtype(group, name)) for name in stored.names(group)}
    here = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    wrong = [
        f"{name}: {_described(there.get(name))} there, {_described(here.get(name))} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{stored.path} is a checkpoint of another model: {'; '.join(wrong[:3])}{more}")


def _described(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "none" if found is None else f"{list(found[0])} {str(found[1]).removeprefix('torch.')}"
