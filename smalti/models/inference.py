"""A network made ready to be called many times: weights merged, packed and in the asked dtype, perhaps compiled.

What it computes is the network's own function, to the rounding of the asked dtype.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.models.base import BackboneConfig, Fusable
from smalti.nn.conditioning import AdaLN, Conditioning, Modulation, split_modulation
from smalti.ops.whole import keep_whole

# Faster in C than what the compiler makes of their definitions, which it reads element by element.
_WHOLE = ("cosine_heads", "depthwise", "s4d", "shift_mix")
InferenceMode = Literal["eager", "compiled", "frozen"]


class InferenceForm(nn.Module):
    """What `inference_form` returns; called as the network is, without gradients, and with an output of its `dtype`.

    Args:
        mode: what it really does, which is eager where nothing can be compiled.
    """

    def __init__(self, network: nn.Module, config: BackboneConfig, dtype: torch.dtype, mode: InferenceMode) -> None:
        super().__init__()
        self.network, self.config, self.dtype, self.mode = network, config, dtype, mode
        self._compiled: Callable[..., Tensor] | None = None
        self._known: set[tuple[Any, ...]] = set()

    @torch.no_grad()
    def forward(
        self,
        latents: Float[Tensor, "B C H W"],
        timesteps: Float[Tensor, "B"] | Int[Tensor, "B"],
        class_labels: Int[Tensor, "B"] | Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B O H W"]:
        """As the network's; the first call with inputs of another shape, dtype or memory layout compiles a graph.

        Raises:
            ValueError: as the network.
        """
        if self.mode == "eager":
            return self.network(latents, timesteps, class_labels)
        inputs = (latents, timesteps, class_labels)
        # What a graph is made for. Autocast is part of it, and so is the number of threads, which the code contains.
        signature = (
            *((x.shape, x.stride(), x.dtype, x.device) for x in inputs if x is not None),
            torch.is_autocast_enabled(latents.device.type),
            torch.get_num_threads(),
        )
        whole = _WHOLE if latents.device.type == "cpu" else ()
        if signature in self._known:
            with keep_whole(*whole):  # the code looks whether it still holds
                return cast(Callable[..., Tensor], self._compiled)(*inputs)
        if self._compiled is None:
            self._compiled = torch.compile(_alone(self.network), fullgraph=True, dynamic=False)
        with keep_whole(*whole), self._compiling():
            output = self._compiled(*inputs)
        self._known.add(signature)
        return output

    def _compiling(self) -> AbstractContextManager[object]:
        """Weights become constants only while this form's own code is made: other code of the process may train."""
        if self.mode == "compiled":
            return nullcontext()
        return torch._inductor.config.patch(freezing=True)


def inference_form(
    model: nn.Module, *, dtype: torch.dtype = torch.float32, mode: InferenceMode = "eager"
) -> InferenceForm:
    """A new module that computes the same function faster; the model is left as it is, and later changes of its
    weights do not reach the new one.

    Parallel and neighbouring weights are merged where the network can (`fuse()`), the modulations of all blocks are
    one matrix product, and nothing is trainable any more. In bfloat16 the outputs are off by about 1 %; parameters
    that a module lists as `wide_parameters` stay float32.

    Args:
        model: a backbone, on its device.
        dtype: float32 or bfloat16, of weights and outputs.
        mode: eager; compiled = by torch.compile, one graph for each shape of the inputs, within minutes; frozen =
            compiled with the weights packed in as constants, which is the fastest on a CPU. Where nothing can be
            compiled a warning says why, and the form is eager.

    Raises:
        ConfigError: another dtype or mode.
        TypeError: the module is not a backbone of smalti.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"an inference form in {dtype}: choose torch.float32 or torch.bfloat16")
    if mode not in ("eager", "compiled", "frozen"):
        raise ConfigError(f"unknown inference mode {mode!r}; choose from eager, compiled, frozen")
    config = getattr(model, "config", None)
    if not isinstance(config, BackboneConfig):
        raise TypeError(f"{type(model).__name__} has no backbone config: pass the backbone itself, not a wrapper")
    network = (model.fuse() if isinstance(model, Fusable) else deepcopy(model)).eval().requires_grad_(False)
    _convert(network, dtype)
    _join_modulations(network)
    device = next(network.parameters()).device
    if mode != "eager" and (reason := compile_refusal(device)):
        logging.getLogger("smalti").warning("inference runs uncompiled, which is slower: %s", reason)
        mode = "eager"
    return InferenceForm(network, config, dtype, mode)


def compile_refusal(device: torch.device) -> str:
    """Why torch.compile cannot make code for this device here; "" when it can."""
    import torch._inductor.cpp_builder  # here, because it loads the whole compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "torch.compile needs Triton for CUDA: install the triton package"
    if device.type != "cpu":
        return f"torch.compile is used for cpu and cuda only, got {device.type}"
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler: install one, such as g++ or clang++"
    return ""


class AllModulations(nn.Module):
    """Conditioning whose vector is already what every adaLN layer would make of it, one behind the other.

    The network sums its tokens, of which there is one, and hands the sum to its blocks, which take their slices.
    """

    def __init__(self, conditioning: Conditioning, layers: list[AdaLN]) -> None:
        super().__init__()
        self.conditioning = conditioning
        linears = [layer.linear for layer in layers]
        self.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)

    def forward(
        self, timesteps: Float[Tensor, "B"] | Int[Tensor, "B"], class_labels: Int[Tensor, "B"] | None
    ) -> Float[Tensor, "B 1 K"]:
        cond = self.conditioning(timesteps, class_labels).sum(dim=1)
        return F.linear(F.silu(cond), self.weight, self.bias)[:, None]


class SlicedModulation(nn.Module):
    """Stands for an adaLN layer behind `AllModulations`."""

    adaptive = True

    def __init__(self, layer: AdaLN, start: int) -> None:
        super().__init__()
        self.branches, self.parts = layer.branches, layer.parts
        self.start, self.size = start, layer.linear.out_features

    def forward(self, cond: Float[Tensor, "B K"]) -> tuple[Modulation, ...]:
        return split_modulation(cond[:, self.start : self.start + self.size], self.branches, self.parts)


def _join_modulations(network: nn.Module) -> None:
    """Put one product in the place of many, for each width of conditioning. Other conditionings have none."""
    for name, conditioning in list(_named(network, Conditioning)):
        layers = [(n, m) for n, m in _named(network, AdaLN) if m.linear.in_features == conditioning.hidden_size]
        if not layers:
            continue
        network.set_submodule(name, AllModulations(conditioning, [layer for _, layer in layers]))
        start = 0
        for layer_name, layer in layers:
            network.set_submodule(layer_name, SlicedModulation(layer, start))
            start += layer.linear.out_features


def _named(network: nn.Module, kind: type[Any]) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in network.named_modules() if isinstance(module, kind))


def _convert(network: nn.Module, dtype: torch.dtype) -> None:
    """All numbers in the dtype, but those that a module keeps wide, which are never narrower than float32."""
    wide = {
        id(tensor): torch.promote_types(dtype, torch.float32)
        for module in network.modules()
        for name in getattr(module, "wide_parameters", ())
        if (tensor := getattr(module, name)) is not None
    }
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    tensors[name] = _as(tensor, wide.get(id(tensor), dtype))  # type: ignore[assignment]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    found = tensor.detach().to(dtype)
    return nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found


def _alone(network: nn.Module) -> Callable[..., Tensor]:
    """A function with a code object of its own: the compiler keeps what it made by code, and few pieces for each."""

    def call(latents: Tensor, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        return network(latents, timesteps, class_labels)

    call.__code__ = call.__code__.replace(co_name=f"inference_{id(network)}")
    return call
