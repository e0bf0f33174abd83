"""Run by test_distributed.py in a process of its own, because it forks: the same steps by one process and by several.

Prints one JSON object: for each number of processes, network and setting, how far from one process they were.
"""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from processes import Crew, begin
from tiny_runs import array_images, scramble, tiny_config

from smalti.data import SampleOrder
from smalti.data.examples import PixelExamples
from smalti.diffusion.levels import build_schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.nn.mixers.bi_ssm import BiSSM
from smalti.presets import create_model
from smalti.training import EMA, TrainState, train_steps
from smalti.training.batches import BatchSource
from smalti.training.config import ParallelConfig
from smalti.training.distributed import Parallel, local_part, whole
from smalti.training.optim import build_optimizer
from smalti.training.validation import make_triples, validate
from smalti.world import world

STEPS = 4
NETWORKS = {
    "dit": {"depth": 2, "hidden_size": 16, "num_heads": 2},
    "diffussm": {"depth": 2, "hidden_size": 16},
    "drwkv": {"depth": 3, "hidden_size": 16},
    "udit": {"hidden_size": 16, "depth": [1, 0, 1, 1, 1]},
}
DDP, FSDP = ParallelConfig(strategy="ddp"), ParallelConfig(strategy="fsdp")
HSDP = ParallelConfig(strategy="hsdp", shard_size=2)
SETTINGS = {
    "plain": (DDP, {}),
    "ddp": (DDP, {}),
    "fsdp": (FSDP, {}),
    "hsdp": (HSDP, {}),
    "bf16": (ParallelConfig(), {"precision": "bf16"}),
    "ddp-bf16": (DDP, {"precision": "bf16"}),
    "fsdp-bf16": (FSDP, {"precision": "bf16"}),
    "uneven": (ParallelConfig(), {"batch_size": 16}),
    "ddp-uneven": (DDP, {"batch_size": 16}),
    "fsdp-uneven": (FSDP, {"batch_size": 16, "micro_batch": 2}),
    "fewer": (ParallelConfig(), {"batch_size": 5}),
    "ddp-fewer": (DDP, {"batch_size": 5, "micro_batch": 1}),
    "fsdp-fewer": (FSDP, {"batch_size": 5, "micro_batch": 1}),
    "fewest": (ParallelConfig(), {"batch_size": 3}),
    "hsdp-fewest": (HSDP, {"batch_size": 3}),
    "parts": (ParallelConfig(), {"stochastic_depth": 0.3}),
    "ddp-parts": (DDP, {"stochastic_depth": 0.3, "micro_batch": 2}),
    "fsdp-parts": (replace(FSDP, reshard=False), {"stochastic_depth": 0.3, "micro_batch": 2}),
    "fsdp-selective-parts": (
        replace(FSDP, activation_checkpointing="selective"),
        {"stochastic_depth": 0.3, "micro_batch": 2},
    ),
    "ddp-full-parts": (replace(DDP, activation_checkpointing="full"), {"stochastic_depth": 0.3, "micro_batch": 2}),
}
SHORT = {2: {"dit": ["ddp", "fsdp"], "diffussm": ["fsdp", "fsdp-bf16"], "udit": ["fsdp"]}, 3: {"dit": ["fsdp-fewer"]}}
# number of processes -> network -> settings; the last part of a setting's name is what one process does
PLAN = {
    2: {
        "dit": ["ddp", "fsdp", "ddp-bf16", "fsdp-bf16", "ddp-parts", "fsdp-parts", "fsdp-selective-parts"],
        "diffussm": ["ddp", "fsdp", "ddp-bf16", "fsdp-bf16"],
        "drwkv": ["ddp", "fsdp", "ddp-bf16", "fsdp-bf16", "ddp-full-parts"],
        "udit": ["ddp", "fsdp", "ddp-bf16", "fsdp-bf16"],
    },
    3: {"dit": ["ddp-uneven", "fsdp-uneven"]},
    4: {"dit": ["hsdp", "ddp-fewer", "fsdp-fewer", "hsdp-fewest"], "diffussm": ["hsdp"]},
}


def run(kind, setting, me):
    """Losses, norms, and everything that the steps left behind, whole."""
    parallel, changes = SETTINGS[setting]
    config = tiny_config(Path(), Path(), steps=STEPS, parallel=parallel, **changes)
    side = 16 if kind == "udit" else 8
    pixels = np.random.default_rng(1).integers(0, 256, (40, side, side, 3), dtype=np.uint8)
    examples = PixelExamples(array_images(pixels, np.arange(40) % 9))
    batches = BatchSource(
        examples=examples,
        order=SampleOrder(range(40), 0),
        schedule=build_schedule("linear", 1000),
        objective=ObjectiveConfig(prediction="v"),
        null_class=9,
        flip=False,
        seed=0,
    )
    torch.manual_seed(0)
    network = create_model(f"{kind}-emoji32", sample_size=side, **NETWORKS[kind])
    scramble(network)
    ema = EMA(network, 0.9)
    shared = Parallel.prepare(parallel, me, torch.device("cpu"), config.precision)
    shared.evaluated(ema.model)
    engine = shared.trained(network)
    met = {}

    def note(module, args, *, name):
        met.update({f"{name}.{k}".strip("."): str(p.dtype) for k, p in module.named_parameters(recurse=False)})

    for name, module in network.named_modules():
        module.register_forward_pre_hook(functools.partial(note, name=name))
    state = TrainState(network, ema, build_optimizer(network, config.optimizer), engine=engine)
    finer, clip = set(), torch.nn.utils.clip_grad_norm_

    def look(parameters, limit):
        gradients = {name: local_part(p.grad) for name, p in network.named_parameters() if p.grad is not None}
        finer.update(name for name, gradient in gradients.items() if not gradient.equal(gradient.bfloat16().float()))
        return clip(parameters, limit)

    with mock.patch("torch.nn.utils.clip_grad_norm_", look):
        reports = list(train_steps(state, batches, config))
    triples = make_triples(examples, list(range(40)), batches.schedule, 0)
    loss = validate(ema.model, triples, "v", precision=config.precision, batch_size=7, world=me)
    kept = [module for module in ema.model.modules() if isinstance(module, BiSSM) and module._kept is not None]
    state = {f"model.{name}": whole(tensor).clone() for name, tensor in network.state_dict().items()}
    state |= {f"ema.{name}": whole(tensor).clone() for name, tensor in ema.model.state_dict().items()}
    return {
        "losses": [report.loss for report in reports],
        "norms": [report.grad_norm for report in reports],
        "state": state,
        "validation": [loss.mean, *loss.strata],
        "kept": len(kept) if shared.mesh is not None else 0,
        "met": met,
        "finer": sorted(finer),
    }


def work(rank, plan, path):
    with world() as me:
        found = {f"{kind} {name}": run(kind, name, me) for kind, names in plan.items() for name in names}
    torch.save(found, path / f"{me.size}-{rank}.pt")


def far(ours, exact):
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, exact, strict=True))


def main(folder, many):
    base = {}
    for plan in many.values():
        for kind, names in plan.items():
            ones = {"plain" if name in ("ddp", "fsdp", "hsdp") else name.rsplit("-", 1)[1] for name in names}
            base[kind] = sorted(ones | set(base.get(kind, [])))
    codes, found = [], {}
    for size, plan in {1: base, **many}.items():
        codes += Crew(size, lambda rank, plan=plan: work(rank, plan, folder), folder / "log").wait(200)
    if any(codes):
        sys.exit("\n".join(path.read_text() for path in sorted(folder.glob("log-*.txt"))))
    exact = torch.load(folder / "1-0.pt", weights_only=True)
    for size, plan in many.items():
        ranks = [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        for kind, names in plan.items():
            for name in names:
                one = exact[f"{kind} " + ("plain" if name in ("ddp", "fsdp", "hsdp") else name.rsplit("-", 1)[1])]
                first, *others = (rank[f"{kind} {name}"] for rank in ranks)
                found[f"{size} {kind} {name}"] = {
                    "loss": far(first["losses"], one["losses"]),
                    "first norm": far(first["norms"][:1], one["norms"][:1]),
                    "norm": far(first["norms"], one["norms"]),
                    "validation": far(first["validation"], one["validation"]),
                    "far": max((first["state"][n] - t).abs().max().item() for n, t in one["state"].items()),
                    "names": first["state"].keys() == one["state"].keys(),
                    "agree": all(
                        (o["losses"], o["norms"], o["validation"])
                        == (first["losses"], first["norms"], first["validation"])
                        and all(torch.equal(o["state"][n], t) for n, t in first["state"].items())
                        for o in others
                    ),
                    "kept": first["kept"],
                    "met": first["met"] if name == "fsdp-bf16" else {},
                    "finer": first["finer"] if name == "fsdp-bf16" else [],
                }
    print(json.dumps(found))


if __name__ == "__main__":
    begin()
    main(Path(sys.argv[1]), SHORT if sys.argv[2] == "short" else PLAN)
