"""One step of a tiny network, plain and with compiled blocks: alone, recomputed, and in FSDP's hands.

A program of its own, because the compiler cannot look through the shape checks that the test run puts around every
function. The backend is one that needs no C++ compiler: what is tested is that blocks can be captured and stay whole.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo
from test_memory import NETWORKS, batches_of, new_state
from tiny_runs import tiny_config
from torch.distributed.device_mesh import init_device_mesh

from smalti.training import train_steps
from smalti.training.config import ParallelConfig
from smalti.training.distributed import Parallel, whole
from smalti.world import World


def step(kind, precision, parallel, strategy="single"):
    """Gradient norms of two steps, and the weights after them."""
    torch._dynamo.reset()  # a process compiles the blocks of one network, not of twelve
    config = tiny_config(Path(), Path(), steps=2, batch_size=4, precision=precision, parallel=parallel)
    state = new_state(kind, config)
    mesh = init_device_mesh("cpu", (1,)) if strategy == "fsdp" else None
    dtype = torch.bfloat16 if precision == "bf16" else None
    state.engine = Parallel(parallel, World(), strategy, torch.device("cpu"), dtype, mesh).trained(state.model)
    state.optimizer = torch.optim.AdamW(state.model.parameters(), fused=True)
    state.ema.update = lambda model, update: None
    reports = list(train_steps(state, batches_of(NETWORKS[kind]["sample_size"]), config))
    names = list(state.model.state_dict())
    return (
        [report.grad_norm for report in reports],
        [whole(p).detach().clone() for p in state.model.parameters()],
        names,
    )


def main(folder):
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    compiled = ParallelConfig(compile=True)
    for kind, precisions in (("dit", ("fp32", "bf16")), ("drwkv", ("fp32",)), ("diffussm", ("bf16",))):
        for precision in precisions:
            norms, weights, names = step(kind, precision, ParallelConfig())
            for parallel, strategy in (
                (compiled, "single"),
                (replace(compiled, activation_checkpointing="selective"), "single"),
                (replace(compiled, activation_checkpointing="full"), "fsdp"),
            ):
                found, others, same_names = step(kind, precision, parallel, strategy)
                assert same_names == names
                limit = 1e-5 if precision == "fp32" else 2.0**-8
                for ours, plain in zip(found, norms, strict=True):
                    assert abs(ours - plain) <= limit * plain, (kind, precision, parallel, strategy, found, norms)
                far = max((ours - plain).abs().max().item() for ours, plain in zip(others, weights, strict=True))
                # In bfloat16, AdamW turns the noise of a gradient near zero into whole steps of 1e-4.
                assert far <= (2e-5 if precision == "fp32" else 4e-4), (kind, precision, parallel, strategy, far)
                print("ok", kind, precision, strategy, parallel.activation_checkpointing)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
