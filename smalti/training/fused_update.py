"""Optimizer step and average of the weights in one pass over the bytes, where the tensors allow it."""

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from smalti.ops.adamw_ema import Operands, Rates, adamw_ema
from smalti.ops.adamw_ema import refuses as kernel_refuses
from smalti.training.ema import EMA

_PLAIN = {Tensor, nn.Parameter}
_UNSUPPORTED = ("amsgrad", "maximize", "capturable", "differentiable")


def update(optimizer: torch.optim.AdamW, ema: EMA, model: nn.Module, number: int) -> None:
    """What `optimizer.step(); ema.update(model, number)` does, to the same tensors, reading and writing each once.

    On a CPU with AVX2 the bits are the same too; elsewhere they may differ by the rounding of a fused multiply-add.
    Where `refuses` has a reason, it is those two calls.

    Args:
        number: of this update, from 0, as `EMA.update` counts.
    """
    with torch.no_grad():
        work = _work(optimizer, ema, model, number)
        if isinstance(work, _Work):
            work.run()
            return
    optimizer.step()
    ema.update(model, number)


def refuses(optimizer: torch.optim.AdamW, ema: EMA, model: nn.Module) -> str:
    """Why the next `update` takes the two plain calls; "" = it takes one pass. The first step of a run does not."""
    with torch.no_grad():
        work = _work(optimizer, ema, model, 0)
    return work if isinstance(work, str) else ""


class _Work:
    """All of an update, sorted by who does it."""

    def __init__(self, average: float) -> None:
        self.average = average
        self.steps: list[tuple[Operands, Rates]] = []
        self.wrappers: list[Tensor] = []  # whose parts are changed without their knowing
        self.without_gradient: list[tuple[Tensor, Tensor]] = []
        self.copies: list[tuple[Tensor, Tensor]] = []

    def run(self) -> None:
        for operands, rates in self.steps:
            adamw_ema(operands, rates)
        if self.wrappers:
            torch.autograd.graph.increment_version(self.wrappers)
        if self.without_gradient:
            own, others = zip(*((_part(x), _part(y)) for x, y in self.without_gradient), strict=True)
            torch._foreach_lerp_(list(own), list(others), self.average)
        for average, weight in self.copies:
            _part(average).copy_(_part(weight))


def _work(optimizer: torch.optim.AdamW, ema: EMA, model: nn.Module, number: int) -> _Work | str:
    """The work of one update, or why it cannot be done in one pass."""
    if reason := _optimizer_refusal(optimizer):
        return reason
    work = _Work(1 - min(ema.decay, (1 + number) / (10 + number)))  # as EMA.update
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
        if not {type(x) for row in rows for x in row} <= _PLAIN:
            work.wrappers += [x for row in rows for k, x in enumerate(row) if k != 1]
            for k, row in enumerate(rows):
                if isinstance(parts := _local(row), str):
                    return parts
                rows[k] = parts
        operands = Operands(*(list(column) for column in zip(*rows, strict=True)))
        if reason := kernel_refuses(operands):
            return reason
        rates = Rates(
            learning_rate=group["lr"],
            betas=group["betas"],
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            average=work.average,
        )
        work.steps.append((operands, rates))
    for weight, average in averages.values():
        (work.without_gradient if weight.requires_grad else work.copies).append((average, weight))
    work.copies += buffers
    return work


def _pairs(model: nn.Module, copied: nn.Module) -> tuple[dict[int, tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Each parameter with its average, by `id`, and the buffers of the copy with those of the network.

    Not by `parameters()` and `buffers()`: four such walks take as long as the step of a million weights. Nor by the
    tensors themselves, whose hash is a function in Python.
    """
    averages: dict[int, tuple[Tensor, Tensor]] = {}
    buffers: list[tuple[Tensor, Tensor]] = []
    todo: list[tuple[nn.Module | None, nn.Module | None]] = [(model, copied)]
    while todo:
        own, other = todo.pop()
        if own is None or other is None:
            continue
        for name, weight in own._parameters.items():
            average = other._parameters[name]
            if weight is not None and average is not None:
                averages[id(weight)] = weight, average
        for name, buffer in own._buffers.items():
            copy = other._buffers[name]
            if buffer is not None and copy is not None:
                buffers.append((copy, buffer))
        todo += zip(own._modules.values(), other._modules.values(), strict=True)
    return averages, buffers


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
    cut = next(iter(cuts))
    if cut is not None and any(place.is_partial() for place in cut[1]):
        return "a gradient is not summed over the processes yet"
    return [_part(x) for x in row]


def _part(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    part: Tensor = x if type(x) in _PLAIN else x.to_local()  # type: ignore[attr-defined]
    return part
