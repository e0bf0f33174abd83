"""Less memory for the same gradients: recomputation, smaller micro-batches, and what happens when memory runs out."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import array_images, scramble, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from smalti.data import SampleOrder
from smalti.data.examples import PixelExamples
from smalti.diffusion.levels import build_schedule
from smalti.diffusion.objectives import ObjectiveConfig
from smalti.errors import ConfigError
from smalti.presets import create_model
from smalti.training import EMA, TrainState, loop, train_steps
from smalti.training.batches import BatchSource
from smalti.training.distributed import Engine, Parallel, apply_activation_checkpointing
from smalti.training.loop import MicroBatchTooLargeError, parts_of
from smalti.training.optim import build_optimizer
from smalti.world import World

NETWORKS = {
    "dit": {"depth": 2, "hidden_size": 16, "num_heads": 2, "sample_size": 8},
    "diffussm": {"depth": 2, "hidden_size": 16, "sample_size": 8},
    "drwkv": {"depth": 3, "hidden_size": 16, "sample_size": 8},
    "udit": {"hidden_size": 16, "depth": [1, 0, 1, 0, 1], "sample_size": 16},
}


def batches_of(side):
    pixels = np.random.default_rng(1).integers(0, 256, (40, side, side, 3), dtype=np.uint8)
    return BatchSource(
        examples=PixelExamples(array_images(pixels, np.arange(40) % 9)),
        order=SampleOrder(range(40), 0),
        schedule=build_schedule("linear", 1000),
        objective=ObjectiveConfig(prediction="v"),
        null_class=9,
        flip=False,
        seed=0,
    )


def new_state(kind, config, policy="none"):
    torch.manual_seed(0)
    network = create_model(f"{kind}-emoji32", **NETWORKS[kind])
    scramble(network)
    ema = EMA(network, 0.9)
    names = list(network.state_dict())
    apply_activation_checkpointing(network, policy)
    assert list(network.state_dict()) == names
    return TrainState(network, ema, build_optimizer(network, config.optimizer))


def gradients(kind, policy, **changes):
    """Of one step, and how many numbers a block's forward kept for the backward."""
    config = tiny_config("", "", steps=1, batch_size=4, **changes)
    state, met, kept = new_state(kind, config, policy), {}, [0]
    state.optimizer.register_step_pre_hook(
        lambda *_: met.update({n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None})
    )

    def keep(tensor):
        kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (report,) = train_steps(state, batches_of(NETWORKS[kind]["sample_size"]), config)
    return report, met, kept[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_recomputed_blocks_give_the_same_bits_and_keep_less(kind, precision):
    """Stochastic depth too: its hooks must still be there when the backward pass runs blocks again."""
    plain, exact, all_kept = gradients(kind, "none", precision=precision, stochastic_depth=0.5)
    for policy in ("selective", "full"):
        report, met, kept = gradients(kind, policy, precision=precision, stochastic_depth=0.5)
        assert report == plain
        assert met.keys() == exact.keys()
        assert all(torch.equal(met[name], exact[name]) for name in exact)
        assert kept < 0.9 * all_kept


def test_selective_recomputation_runs_no_matrix_product_again():
    def products(policy):
        state = new_state("dit", tiny_config("", ""), policy)
        batch = batches_of(8).at(0, 2)
        with FlopCounterMode(display=False) as counter:
            state.model(batch.x0, torch.full((2,), 5.0), batch.class_labels).square().mean().backward()
        return counter.get_total_flops()

    plain = products("none")
    assert products("selective") == plain
    assert products("full") > 1.2 * plain


@pytest.mark.parametrize(("batch", "size", "micro_batch"), [(16, 3, 4), (5, 4, 5), (3, 4, 1), (7, 2, 2), (8, 1, 3)])
def test_shares_cover_each_batch_once_and_all_processes_make_equally_many_passes(batch, size, micro_batch):
    shares = [parts_of(3, batch, World(rank, size), micro_batch) for rank in range(size)]
    counted = [
        p for share in shares for part in share if part.counts for p in range(part.start, part.start + part.size)
    ]
    assert counted == list(range(3 * batch, 4 * batch))
    assert len({len(share) for share in shares}) == 1
    assert all(0 < part.size <= micro_batch for share in shares for part in share)
    idle = [part for share in shares for part in share if not part.counts]
    assert all(part.size == 1 and 3 * batch <= part.start < 4 * batch for part in idle)


def fails(monkeypatch, largest, first=0):
    """From call `first` on, memory holds `largest` samples."""
    real, calls, seen = loop._run_micro_batch, itertools.count(), []

    def run(state, batch, *args, **kwargs):
        if next(calls) >= first and len(batch) > largest:
            raise torch.OutOfMemoryError("no room")
        seen.append(len(batch))
        return real(state, batch, *args, **kwargs)

    monkeypatch.setattr(loop, "_run_micro_batch", run)
    return seen


def finished(config):
    state = new_state("dit", config)
    reports = list(train_steps(state, batches_of(8), config))
    return reports, {**state.model.state_dict(), **{f"ema.{n}": t for n, t in state.ema.model.state_dict().items()}}


def test_out_of_memory_halves_the_micro_batch_and_does_the_same_step_again(monkeypatch):
    config = tiny_config("", "", steps=3, batch_size=8)
    _, exact = finished(replace(config, micro_batch=2))
    seen = fails(monkeypatch, 3)
    reports, found = finished(config)
    assert [report.micro_batch for report in reports] == [2, 2, 2]
    assert seen == [2] * 12
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_out_of_memory_in_the_middle_of_a_step_leaves_nothing_of_the_failed_try(monkeypatch):
    """Two of three parts were done; a gradient of them that stayed would count twice."""
    config = tiny_config("", "", steps=3, batch_size=8, micro_batch=3)
    _, exact = finished(replace(config, micro_batch=1))
    fails(monkeypatch, 1, first=5)
    reports, found = finished(config)
    assert [report.micro_batch for report in reports] == [3, 1, 1]
    assert max((found[name] - exact[name]).abs().max().item() for name in exact) <= 1e-6


def test_memory_for_less_than_one_image_is_one_line_that_says_what_helps(monkeypatch):
    fails(monkeypatch, 0)
    with pytest.raises(ConfigError, match="single image") as caught:
        finished(tiny_config("", "", steps=1, batch_size=8))
    assert "--parallel.activation-checkpointing full" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def run(*args, **kwargs):
        raise RuntimeError("out of memory, says somebody")

    monkeypatch.setattr(loop, "_run_micro_batch", run)
    with pytest.raises(RuntimeError, match="says somebody"):
        finished(tiny_config("", "", steps=1, batch_size=8))


def test_one_of_several_processes_cannot_try_again_by_itself(monkeypatch):
    fails(monkeypatch, 2)
    config = tiny_config("", "", steps=1, batch_size=8)
    state = new_state("dit", config)
    state.engine = Engine(state.model, World(1, 2))
    with pytest.raises(MicroBatchTooLargeError, match="process 1 ran out of memory") as caught:
        next(train_steps(state, batches_of(8), config))
    assert (caught.value.micro_batch, caught.value.exit_code) == (2, 75)


def test_processes_that_no_shard_size_divides_are_refused():
    config = tiny_config("", "").parallel
    with pytest.raises(ConfigError, match="8 processes cannot be divided into groups of 3"):
        Parallel.prepare(
            replace(config, strategy="hsdp", shard_size=3), World(0, 8), torch.device("cpu"), precision="fp32"
        )


@pytest.mark.slow
@pytest.mark.long
def test_compiled_blocks_train_as_plain_ones_also_when_recomputed_and_sharded(tmp_path):
    here = Path(__file__).parent
    paths = [str(here.parents[1]), str(here.parent / "support"), str(here), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(here / "compile_training.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok ") == 12
