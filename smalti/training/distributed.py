"""A network that several processes train together: copies (DDP), parts (FSDP2), or parts within groups (HSDP).

Everything here acts on a network from outside, in this order: activation checkpointing, compilation, sharding. Names of
parameters stay those of the plain network.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.nn.mixers.bi_ssm import BiSSM
from smalti.nn.plane import Pointwise
from smalti.training.config import ParallelConfig
from smalti.training.device import autocast_dtype
from smalti.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Strategy = Literal["single", "ddp", "fsdp", "hsdp"]
Checkpointing = Literal["none", "selective", "full"]

# Whose weights autocast rounds at every use; all others it leaves in float32, and so does what is gathered.
_ROUNDED = (nn.Linear, nn.Conv2d, Pointwise)
_GROUPS = "_fsdp_param_groups"  # what PyTorch calls the groups of parameters of a sharded module


@dataclass(frozen=True, eq=False)
class Engine:
    """How the loop reaches a network that may be held by several processes.

    Args:
        call: what takes a batch in training; its parameters are those of the network.
        strategy: single = one process.
        reduce_every: gradients are exchanged after every micro-batch, instead of once a step.
    """

    call: nn.Module
    world: World = field(default_factory=World)
    strategy: Strategy = "single"
    reduce_every: bool = False

    @property
    def sharded(self) -> bool:
        return self.strategy in ("fsdp", "hsdp")

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Forward and backward of one part of a step; gradients are exchanged with the last one."""
        if self.sharded:
            network = cast("Any", self.call)
            network.set_requires_gradient_sync(last or self.reduce_every)
            network.set_is_last_backward(last)
        with cast("Any", self.call).no_sync() if self.strategy == "ddp" and not last else nullcontext():
            yield


@dataclass(frozen=True, eq=False)
class Parallel:
    """What to do to networks so that the processes of a run share them.

    Args:
        mesh: the processes, one dimension for fsdp, (copies, parts) for hsdp; None for the other strategies.
        dtype: of matrix products, as autocast has it; None = that of the weights.
    """

    config: ParallelConfig
    world: World
    strategy: Strategy
    device: torch.device
    dtype: torch.dtype | None
    mesh: "DeviceMesh | None" = None

    @classmethod
    def prepare(cls, config: ParallelConfig, world: World, device: torch.device, precision: str) -> "Parallel":
        """Settle the strategy and form the groups that it needs; every process of the run calls it.

        Raises:
            ConfigError: the processes cannot be divided as asked.
        """
        strategy = strategy_of(config, world)
        mesh = None
        if strategy == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh  # here, because it takes a second

            mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
        if strategy == "hsdp":
            mesh = _two_way_mesh(config, world, device)
        return cls(config, world, strategy, device, autocast_dtype(precision), mesh)

    @property
    def note(self) -> str:
        """What a user would want to know of it; "" = nothing."""
        if self.mesh is None or self.dtype is None or several_groups():
            return ""
        return (
            f"PyTorch {torch.__version__} can only gather all weights in float32, which is twice the bytes of bf16; "
            "2.13 and newer gather most of them in bf16"
        )

    def trained(self, network: nn.Module) -> Engine:
        """Make a network ready for training, in place."""
        apply_activation_checkpointing(network, self.config.activation_checkpointing)
        if self.config.compile:
            compile_blocks(network)
        call: nn.Module = network
        if self.strategy == "ddp":
            # Weights are equal from the start: all processes draw them from the seed, or read the same checkpoint.
            ids = None if self.device.type == "cpu" else [self.device]
            call = nn.parallel.DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
        elif self.mesh is not None:
            self._shard(network, reshard=self.config.reshard)
        # Gradients that wait for the last micro-batch are whole ones, which is what `reshard` is there to avoid.
        return Engine(call, self.world, self.strategy, reduce_every=self.config.reshard)

    def evaluated(self, network: nn.Module) -> None:
        """Shard a network that is only run forward, in place; other strategies leave it as it is."""
        if self.mesh is None:
            return
        for module in network.modules():
            if isinstance(module, BiSSM):
                # What it keeps is made of weights that are given up after the call, and of whose return nobody tells.
                module.register_forward_hook(_forget)
        self._shard(network, reshard=True)

    def _shard(self, network: nn.Module, *, reshard: bool) -> None:
        for block in network.iter_blocks():  # type: ignore[operator]
            self._shard_one(block, reshard=reshard)
        network.register_forward_hook(_own_memory)
        # Said of the root, too: else what it holds after a forward without a backward would be the gathered weights.
        self._shard_one(network, reshard=reshard)

    def _shard_one(self, module: nn.Module, *, reshard: bool) -> None:
        """Shard what is not yet, so that it is gathered in what autocast would make of it.

        One group of parameters has one dtype, and a module has one group. Parameters that stay in float32 get a second
        group beside it, gathered at the same moments; the phases of a state space would not survive 8 bits. Where a
        module cannot have two, all is gathered in float32, and autocast rounds.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        dtype = self.dtype if several_groups() else None
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
        )
        wide = _wide_parameters(module) if dtype is not None else []
        fully_shard(module, mesh=self.mesh, reshard_after_forward=reshard, mp_policy=policy, ignored_params=set(wide))
        if wide:
            _add_group(module, wide, MixedPrecisionPolicy(cast_forward_inputs=False))


def strategy_of(config: ParallelConfig, world: World) -> Strategy:
    """What `auto` means here; a single process needs none."""
    if world.size == 1:
        return "single"
    return "ddp" if config.strategy == "auto" else config.strategy


def _two_way_mesh(config: ParallelConfig, world: World, device: torch.device) -> "DeviceMesh":
    """Neighbouring processes hold the parts of one copy, because those of a machine are neighbours."""
    from torch.distributed.device_mesh import DeviceMesh

    parts = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if world.size % parts:
        raise ConfigError(
            f"{world.size} processes cannot be divided into groups of {parts}: choose a parallel.shard_size that "
            "divides their number"
        )
    ranks = torch.arange(world.size).view(-1, parts)
    timeout = timedelta(minutes=config.timeout_minutes)
    groups = [
        torch.distributed.new_subgroups_by_enumeration(way.tolist(), timeout=timeout)[0] for way in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _wide_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters, of no part that is sharded already, that autocast leaves in float32."""
    from torch.distributed.fsdp import FSDPModule

    found: list[nn.Parameter] = []

    def look(part: nn.Module) -> None:
        if not isinstance(part, _ROUNDED):
            found.extend(part.parameters(recurse=False))
        for child in part.children():
            if not isinstance(child, FSDPModule):
                look(child)

    look(module)
    return found


def _add_group(module: nn.Module, parameters: list[nn.Parameter], policy: Any) -> None:
    """A second group of parameters in the state that `fully_shard` gave the module.

    PyTorch makes several groups of a module itself, for parameters on several meshes, and all it does with groups it
    does with each; that they differ in dtype has no public way.
    """
    from torch.distributed.fsdp import fully_shard

    groups = getattr(fully_shard.state(module), _GROUPS)  # type: ignore[attr-defined]
    if not groups:  # nothing but wide parameters: the module has no group yet
        raise AssertionError("a part of a network without a matrix product")
    first = groups[0]
    groups.append(
        type(first)(
            parameters,
            first.modules,
            first.mesh_info,
            first.post_forward_mesh_info,
            first.device,
            None,
            policy,
            first.offload_policy,
        )
    )


def several_groups() -> bool:
    """Whether a module can hold parameters that are gathered in several dtypes: since PyTorch 2.13."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState  # as `fully_shard` gives every module

    return hasattr(FSDPState(), _GROUPS)


def _own_memory(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """Not a view: a change in place would lose what FSDP hangs on it to gather weights for the backward pass."""
    return output.clone() if output._is_view() else output


def _forget(module: nn.Module, args: object, output: object) -> None:
    cast(BiSSM, module).forget()


def apply_activation_checkpointing(network: nn.Module, policy: Checkpointing) -> None:
    """Let the backward pass compute again what the blocks of a network would have kept, in place.

    Args:
        policy: none; full = whole blocks; selective = all but what takes long to compute: matrix products,
            convolutions, attention, Fourier transforms and the scans of this package.
    """
    if policy == "none":
        return
    from torch.utils.checkpoint import checkpoint

    context: dict[str, Any] = {} if policy == "full" else {"context_fn": _keep_what_is_costly}
    for block in network.iter_blocks():  # type: ignore[operator]
        # Networks hold no randomness, so there is no random state to restore.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **context)


def _keep_what_is_costly() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_keeps)


_COSTLY = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_fft_r2c",
    "_fft_c2r",
    "_fft_c2c",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}


def _keeps(context: object, op: Any, *args: object, **kwargs: object) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    namespace, _, name = op.name().partition("::")
    costly = namespace == "smalti" or (namespace == "aten" and name.partition(".")[0] in _COSTLY)
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(network: nn.Module) -> None:
    """torch.compile for each block alone, in place: what shards a block stays outside the compiled code."""
    for block in network.iter_blocks():  # type: ignore[operator]
        block.forward = torch.compile(block.forward)


def as_sharded(tensor: Tensor) -> "DTensor | None":
    """The tensor itself if this process holds a part of it, else None."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and without it there is no such tensor
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: of a plain one all, in the same memory."""
    sharded = as_sharded(tensor)
    return tensor if sharded is None else cast("DTensor", sharded.detach()).to_local()


def place_of(tensor: "DTensor") -> tuple[int, bool]:
    """The first row that this process holds, and whether it is the one of those with the same rows to write them."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    coordinate = tensor.device_mesh.get_coordinate() or ()
    first = all(
        at == 0 or not isinstance(way, Replicate) for at, way in zip(coordinate, tensor.placements, strict=True)
    )
    return offset[0], first


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process calls it."""
    sharded = as_sharded(tensor)
    return tensor if sharded is None else sharded.full_tensor()
