"""Optimizer step and average of the weights in one pass over the bytes, where the tensors allow it."""

from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from smalti.ops.adamw_ema import Operands, Rates, Table, adamw_ema
from smalti.ops.adamw_ema import refuses as kernel_refuses
from smalti.training.ema import EMA

_PLAIN = {Tensor, nn.Parameter}
_UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")
_REQUIRES_GRAD, _GRAD = attrgetter("requires_grad"), attrgetter("grad")
_MEMBERS = attrgetter("_parameters", "_buffers", "_modules")


class Updates:
    """The updates of a run. Remembers between them which tensors they were about, and asks only whether that holds."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.AdamW, ema: EMA, model: nn.Module, number: int) -> None:
        """What `optimizer.step(); ema.update(model, number)` does, to the same tensors, reading and writing each once.

        On a CPU with AVX2 the bits are the same too; elsewhere they may differ by the rounding of a fused multiply-add.
        Where `refuses` has a reason, it is those two calls.

        Args:
            number: of this update, from 0, as `EMA.update` counts.
        """
        kept, self._plan = self._plan, None
        holds = kept is not None and kept.holds(optimizer, ema, model)
        plan = kept if kept is not None and holds else _plan(optimizer, ema, model)
        if isinstance(plan, str):
            optimizer.step()
            ema.update(model, number)
            return
        plan.run(1 - ema.decay_at(number))
        self._plan = plan if plan.returns else None


def update(optimizer: torch.optim.AdamW, ema: EMA, model: nn.Module, number: int) -> None:
    """One update by itself, as the first of `Updates`."""
    Updates()(optimizer, ema, model, number)


def refuses(optimizer: torch.optim.AdamW, ema: EMA, model: nn.Module) -> str:
    """Why the next update takes the two plain calls; "" = it takes one pass. The first step of a run does not."""
    with torch.no_grad():
        plan = _plan(optimizer, ema, model)
    return plan if isinstance(plan, str) else ""


@dataclass
class _Plan:
    """All of an update, sorted by who does it, and everything that it was made from.

    Args:
        steps: groups of the optimizer with the tensors of theirs that have gradients.
        wrappers: tensors whose parts are changed without their knowing.
        returns: whether it may be used again; parts of distributed tensors are looked up anew each time.
    """

    optimizer: torch.optim.AdamW
    averages: nn.Module
    model: nn.Module
    structure: "_Structure"
    steps: list[tuple[dict[str, Any], Table, list[Tensor]]] = field(default_factory=list)
    wrappers: list[Tensor] = field(default_factory=list)
    without_gradient: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    returns: bool = True

    def holds(self, optimizer: torch.optim.AdamW, ema: EMA, model: nn.Module) -> bool:
        """Whether a plan made now would be this one but for the gradients, which it takes over."""
        if (
            optimizer is not self.optimizer
            or _optimizer_refusal(optimizer)
            or any(map(_group_refusal, optimizer.param_groups))
            or torch.compiler.is_compiling()
            or model is not self.model
            or ema.model is not self.averages
            or not self.structure.holds(optimizer)
        ):
            return False
        # Structure holds: weights without a gradient then are those without one now.
        gradients = [list(map(_GRAD, weights)) for _, _, weights in self.steps]
        if any(x is None for column in gradients for x in column):
            return False
        return all(table.follow(column) for (_, table, _), column in zip(self.steps, gradients, strict=True))

    def run(self, average: float) -> None:
        for group, table, _ in self.steps:
            rates = Rates(
                learning_rate=group["lr"],
                betas=group["betas"],
                epsilon=group["eps"],
                weight_decay=group["weight_decay"],
                average=average,
            )
            adamw_ema(table, rates)
            table.release()
        if self.wrappers:
            torch.autograd.graph.increment_version(self.wrappers)
        if self.without_gradient:
            own, others = zip(*((_part(x), _part(y)) for x, y in self.without_gradient), strict=True)
            torch._foreach_lerp_(list(own), list(others), average)
        for copied, weight in self.copies:
            _part(copied).copy_(_part(weight))


class _Structure:
    """Which objects make up optimizer, network and average: held, so that no other object can have their `id`.

    Asked in every step, so all of it is a few passes in C over lists. Views of dicts show what is in them later. Empty
    ones are not asked again: what they get, no optimizer has.
    """

    def __init__(self, optimizer: torch.optim.AdamW, copied: nn.Module, model: nn.Module) -> None:
        members = chain.from_iterable(map(_MEMBERS, chain(model.modules(), copied.modules())))
        dicts = [*filter(None, members), *optimizer.state.values()]
        self._state = optimizer.state
        self._views = [*(x.values() for x in dicts), optimizer.state.keys(), optimizer.state.values()]
        self._held = list(chain.from_iterable(self._views))
        self._ids = list(map(id, self._held))
        self._weights = list(model.parameters())
        self._trained = list(map(_REQUIRES_GRAD, self._weights))
        self._groups = list(optimizer.param_groups)
        self._members = [list(group["params"]) for group in self._groups]
        self._member_ids = [list(map(id, weights)) for weights in self._members]
        self._bare = [x for weights in self._members for x in weights if x.grad is None]

    def holds(self, optimizer: torch.optim.AdamW) -> bool:
        return (
            optimizer.state is self._state
            and list(map(id, chain.from_iterable(self._views))) == self._ids
            and list(map(id, optimizer.param_groups)) == list(map(id, self._groups))
            and [list(map(id, group["params"])) for group in optimizer.param_groups] == self._member_ids
            and list(map(_REQUIRES_GRAD, self._weights)) == self._trained
            and all(x is None for x in map(_GRAD, self._bare))
        )


def _plan(optimizer: torch.optim.AdamW, ema: EMA, model: nn.Module) -> _Plan | str:
    """The work of one update, or why it cannot be done in one pass."""
    if reason := _optimizer_refusal(optimizer):
        return reason
    plan = _Plan(optimizer, ema.model, model, _Structure(optimizer, ema.model, model))
    averages, buffers = _pairs(model, ema.model)
    for group in optimizer.param_groups:
        if reason := _group_refusal(group):
            return reason
        rows: list[list[Tensor]] = []
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = optimizer.state.get(weight)
            if not state:
                return "a parameter has no moments yet; torch's own first step makes them"
            _, average = averages.pop(id(weight), (None, None))
            if average is None or not weight.requires_grad:
                return "the optimizer has a parameter that the network does not train"
            rows.append([weight, weight.grad, state["exp_avg"], state["exp_avg_sq"], average, state["step"]])
        if not rows:
            continue
        weights = [row[0] for row in rows]
        if not {type(x) for row in rows for x in row} <= _PLAIN:
            plan.returns = False
            plan.wrappers += [x for row in rows for k, x in enumerate(row) if k != 1]
            for k, row in enumerate(rows):
                if isinstance(parts := _local(row), str):
                    return parts
                rows[k] = parts
        operands = Operands(*(list(column) for column in zip(*rows, strict=True)))
        if reason := kernel_refuses(operands):
            return reason
        plan.steps.append((group, Table(operands), weights))
    for weight, average in averages.values():
        (plan.without_gradient if weight.requires_grad else plan.copies).append((average, weight))
    plan.copies += buffers
    return plan


def _pairs(model: nn.Module, copied: nn.Module) -> tuple[dict[int, tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Each parameter with its average, by `id`, and the buffers of the copy with those of the network."""
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    buffers = zip(copied.buffers(), model.buffers(), strict=True)
    return {id(weight): (weight, average) for weight, average in pairs}, list(buffers)


def _optimizer_refusal(optimizer: torch.optim.AdamW) -> str:
    """Whatever else a call of `step` would do, nobody would do here."""
    if type(optimizer) is not torch.optim.AdamW:
        return f"it knows AdamW, got {type(optimizer).__name__}"
    if not optimizer.defaults["fused"]:
        return "the optimizer was made with fused=False, whose step rounds otherwise"
    if "step" in vars(optimizer):
        return "somebody replaced the optimizer's step, as schedulers of torch do"
    if any(
        (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
    ):
        return "the optimizer has hooks, which its own step calls"
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        return "a gradient scaler wants the step to divide"
    return ""


def _group_refusal(group: dict[str, object]) -> str:
    if used := [name for name in _UNSUPPORTED if group[name]]:
        return f"it does not know {used[0]}"
    if any(isinstance(x, Tensor) for x in (group["lr"], *group["betas"])):  # type: ignore[misc]
        return "rates are tensors, which may have to be waited for"
    return ""


def _local(row: list[Tensor]) -> list[Tensor] | str:
    """The parts of distributed tensors that this process holds; all cut in the same way, except for the counter."""
    from torch.distributed.tensor import DTensor  # heavy, and here already where there is one

    if unknown := [x for x in row if type(x) not in (*_PLAIN, DTensor)]:
        return f"it reads memory, which a {type(unknown[0]).__name__} may not have"
    cuts = {(x.device_mesh, x.placements) if isinstance(x, DTensor) else None for x in row[:-1]}
    if len(cuts) != 1:
        return "weight, gradient, moments and average are cut differently between the processes"
    return [_part(x) for x in row]


def _part(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    part: Tensor = x if type(x) in _PLAIN else x.to_local()  # type: ignore[attr-defined]
    return part
