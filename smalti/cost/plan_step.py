"""Memory of one training step, followed tensor by tensor on tensors without numbers.

Every op of PyTorch runs on `FakeTensorMode` tensors, which have shapes and storages and no memory; a storage counts
from the op that made it until nobody holds it. `torch.distributed._tools.mem_tracker.MemTracker` counts so, too; its
account by module takes several times as long. Room that a kernel takes for itself is not seen.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smalti.cost.plan_request import CheckpointPolicy
from smalti.models import BackboneConfig, build_backbone
from smalti.ops.dispatch import Op, watch
from smalti.ops.in_memory import pretend

Hardware = Literal["cpu", "cuda"]
ApplyPolicy = Callable[[nn.Module, CheckpointPolicy], object]

# Twins that refuse tensors of a GPU; what is left is what a GPU runs.
CPU_TWINS = frozenset({"c", "matmul"})
# What autocast computes in float32 on CUDA and leaves alone on a CPU, of all that networks here call.
_WIDE_ON_CUDA = frozenset({"layer_norm", "group_norm", "softmax", "exp", "expm1", "pow", "sum", "rsqrt", "norm"})


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one forward and backward pass of a micro-batch, weights, moments and average left out.

    Args:
        kept: alive when the forward pass ends, for the backward pass; inputs included.
        copies: of `kept`, the weights in the precision of the matrix products, which autocast makes.
        peak: the most that is alive at once, gradients left out.
        peak_with_gradients: the same with gradients, which come as activations go; full from the start if they add up
            over several micro-batches.
        peak_without_copies: as `peak`, for those who gather weights in the right precision.
    """

    kept: int
    copies: int
    peak: int
    peak_with_gradients: int
    peak_without_copies: int


def step_memory(
    network: BackboneConfig,
    micro_batch: int,
    *,
    precision: Literal["fp32", "tf32", "bf16"] = "fp32",
    policy: CheckpointPolicy = "none",
    hardware: Hardware = "cuda",
    accumulating: bool = False,
    apply_policy: ApplyPolicy | None = None,
) -> StepMemory:
    """Memory of a training step of any network and batch, without having it.

    The loss counts as a mean square; what `smalti train` adds to that is a few numbers per image. Calls with the same
    arguments are remembered.

    Args:
        hardware: whose implementation of each op runs. "cuda" stands for any GPU: its choice of ops and its autocast.
        accumulating: gradients of an earlier micro-batch are there already.
        apply_policy: puts a policy into a network, by replacing `forward` of some of its modules.

    Raises:
        ValueError: the network refuses its own size, or there is a policy and nothing that applies it.
    """
    if policy != "none" and apply_policy is None:
        raise ValueError(f"activation checkpointing {policy!r} needs apply_policy: training has one")
    return _step_memory(network, micro_batch, precision, policy, hardware, accumulating, apply_policy)


@lru_cache(maxsize=256)
def _step_memory(
    config: BackboneConfig,
    micro_batch: int,
    precision: str,
    policy: CheckpointPolicy,
    hardware: Hardware,
    accumulating: bool,
    apply_policy: ApplyPolicy | None,
) -> StepMemory:
    with fake_step(config, policy, hardware, apply_policy) as network:
        inputs = training_inputs(config, micro_batch)
        follow = StepFollower(network, inputs)
        if accumulating:
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        with follow:
            loss = training_loss(network, inputs, precision)
            follow.forward_ended()
            loss.backward()
        return follow.memory()


@contextmanager
def fake_step(
    config: BackboneConfig, policy: CheckpointPolicy, hardware: Hardware, apply_policy: ApplyPolicy | None = None
) -> Iterator[nn.Module]:
    """A network without numbers, and everything around it that makes ops choose as on that hardware."""
    mode, network = _fake_network(config)
    with ExitStack() as around:
        around.enter_context(mode)
        around.callback(_plain_again, network)
        if hardware == "cuda":
            for block in network.iter_blocks():  # type: ignore[operator]
                block.forward = _with_autocast_of_cuda(block.forward)
            around.enter_context(_AutocastOfCuda())
            around.enter_context(watch(_choice_of_cuda))
        else:
            around.enter_context(pretend())
        if apply_policy is not None:
            apply_policy(network, policy)
        yield network


@lru_cache(maxsize=2)
def _fake_network(config: BackboneConfig) -> tuple[FakeTensorMode, nn.Module]:
    """Kept, because to make all the initial weights takes as long as a step."""
    mode = FakeTensorMode()
    with torch.random.fork_rng(devices=[]), mode:
        return mode, build_backbone(config)


def _plain_again(network: nn.Module) -> None:
    for module in network.modules():
        module.__dict__.pop("forward", None)
    network.zero_grad(set_to_none=True)


def training_inputs(config: BackboneConfig, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Target, latents, timesteps and labels, as one step of training has them."""
    latents = torch.randn(batch, config.in_channels, *config.sample_size)
    target = torch.randn(batch, config.out_channels, *config.sample_size)
    labels = torch.zeros(batch, dtype=torch.int64) if config.num_classes else None
    return target, latents, torch.rand(batch), labels


def training_loss(network: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], precision: str) -> Tensor:
    """The mean square of output less target, in autocast where the precision asks for it."""
    target, latents, timesteps, labels = inputs
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=precision == "bf16"):
        output = network(latents, timesteps, labels)
        return (output.to(target.dtype) - target).square().mean()


class StepFollower(TorchDispatchMode):
    """Counts the bytes that live at the same time, what `network` holds at the beginning left out."""

    def __init__(self, network: nn.Module, inputs: tuple[Tensor | None, ...]) -> None:
        super().__init__()
        self._state = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
        self._weights = {p.untyped_storage()._cdata for p in network.parameters()}
        self._sizes: dict[int, int] = {}
        self._gradients: set[int] = set()
        self._copies: set[int] = set()
        self._now = self._now_gradients = self._now_copies = 0
        self._kept = self._kept_copies = self._peak = self._peak_all = self._peak_bare = 0
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._note_gradient) for p in network.parameters() if p.requires_grad
        ]
        self._network = network
        for tensor in inputs:
            if tensor is not None:
                self._add(tensor.untyped_storage())

    def __enter__(self) -> Any:
        for parameter in self._network.parameters():
            if parameter.grad is not None:
                self._add(parameter.grad.untyped_storage())
                self._note_gradient(parameter)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for hook in self._hooks:
            hook.remove()

    def forward_ended(self) -> None:
        """What lives now is what the backward pass needs."""
        self._kept, self._kept_copies = self._now - self._now_gradients, self._now_copies

    def memory(self) -> StepMemory:
        """Of the steps since the beginning."""
        return StepMemory(self._kept, self._kept_copies, self._peak, self._peak_all, self._peak_bare)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default:
            result = _as_kernels_do(result, args[2])
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if self._add(storage) and func is torch.ops.aten._to_copy.default:
                    source = args[0]
                    if source.untyped_storage()._cdata in self._weights and leaf.itemsize < source.itemsize:
                        self._copies.add(storage._cdata)
                        self._now_copies += storage.nbytes()
        self._peak_all = max(self._peak_all, self._now)
        self._peak = max(self._peak, self._now - self._now_gradients)
        self._peak_bare = max(self._peak_bare, self._now - self._now_gradients - self._now_copies)
        return result

    def _add(self, storage: torch.UntypedStorage) -> bool:
        name = storage._cdata
        if name in self._sizes or name in self._state:
            return False
        self._sizes[name] = storage.nbytes()
        self._now += storage.nbytes()
        weakref.finalize(storage, self._remove, name)
        return True

    def _remove(self, name: int) -> None:
        size = self._sizes.pop(name)
        self._now -= size
        if name in self._gradients:
            self._gradients.discard(name)
            self._now_gradients -= size
        if name in self._copies:
            self._copies.discard(name)
            self._now_copies -= size

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        name = parameter.grad.untyped_storage()._cdata
        if name not in self._gradients and name in self._sizes:
            self._gradients.add(name)
            self._now_gradients += self._sizes[name]


def _as_kernels_do(result: tuple[Tensor, Tensor, Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where inputs are bf16 and weights float32, kernels keep statistics in float32; PyTorch's fake form has bf16."""
    output, mean, deviation = result
    if weight is None or weight.dtype == mean.dtype:
        return result
    return output, mean.to(weight.dtype), deviation.to(weight.dtype)


def _choice_of_cuda(op: Op, args: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
    name = next((name for name in op.fast if name not in CPU_TWINS), None)
    return op.reference(*args, **options) if name is None else op.fast[name](*args, **options)


class _AutocastOfCuda(TorchFunctionMode):
    """Autocast of tensors on a CPU takes the same products down; these are what only CUDA's takes up."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _WIDE_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(_wide(a) for a in args)
        return func(*args, **kwargs)


def _with_autocast_of_cuda(forward: Any) -> Any:
    """For blocks that run once more in the backward pass, where modes of functions sleep."""

    def run(*args: Any) -> Any:
        with _AutocastOfCuda():
            return forward(*args)

    return run


def _wide(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value
