"""Memory of a training step that nobody took, against steps that were: MemTracker's account of a real run on this CPU.

Real steps run the C twins; fake ones go through the same code without calling C. So both make the same tensors.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from smalti.cost.plan_step import (
    CPU_TWINS,
    StepFollower,
    fake_step,
    step_memory,
    training_inputs,
    training_loss,
)
from smalti.models import build_backbone
from smalti.ops import OPS
from smalti.presets import preset_config
from smalti.training.distributed import apply_activation_checkpointing
from smalti.workflows.timed import TimedNetwork

CPU = torch.device("cpu")
SMALL = ("dit-emoji32", "diffussm-emoji32", "drwkv-emoji32", "udit-emoji32")
BATCH = 2


class NoModules:
    """In the place of MemTracker's account by module, whose hooks keep gradients alive that nobody needs any more."""

    is_bw, parents = False, frozenset()

    def register_user_hooks(self, *hooks):
        pass

    def clear_user_hooks(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def tracked(network, precision):
    """What MemTracker says beside the state: (alive after the forward, most in forward and backward, and in all)."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for p in trained:  # moments exist from the second step on
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    inputs = training_inputs(network.config, BATCH)
    tracker = MemTracker()
    tracker._mod_tracker = NoModules()
    tracker.track_external(network, optimizer)
    state = tracker.get_tracker_snapshot()[CPU]["Total"]
    tracker.track_external(*(i for i in inputs if i is not None))
    with tracker:
        loss = training_loss(network, inputs, precision)
        kept = tracker.get_tracker_snapshot()[CPU]["Total"]
        loss.backward()
        peak = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
        optimizer.step()
        whole = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    return kept - state, peak - state, whole - state


def followed(context, precision):
    with context as network:
        inputs = training_inputs(network.config, BATCH)
        follower = StepFollower(network, inputs)
        with follower:
            loss = training_loss(network, inputs, precision)
            follower.forward_ended()
            loss.backward()
    return follower.memory()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_activation_memory_of_a_small_preset_is_that_of_a_real_step_to_the_byte(name, precision, seeded):
    config = preset_config(name)
    kept, peak, whole = tracked(build_backbone(config), precision)
    planned = step_memory(config, BATCH, precision=precision, hardware="cpu")
    assert (planned.kept, planned.peak_with_gradients) == (kept, peak)
    assert whole == peak  # the fused update needs no room


@pytest.mark.parametrize("name", ["dit-emoji32", "diffussm-emoji32"])
def test_a_step_of_the_training_loop_needs_what_is_planned_but_for_its_own_loss(name):
    network = TimedNetwork(preset_config(name), 8, "bf16", CPU)
    for _ in range(2):
        network.training_step()
    state = network._steps.gi_frame.f_locals["state"]
    tracker = MemTracker()
    tracker._mod_tracker = NoModules()
    tracker.track_external(state.model, state.ema.model, state.optimizer)
    before = tracker.get_tracker_snapshot()[CPU]["Total"]
    with tracker:
        network.training_step()
    measured = tracker.get_tracker_snapshot("peak")[CPU]["Total"] - before
    planned = step_memory(preset_config(name), 8, precision="bf16", hardware="cpu")
    assert planned.peak_with_gradients == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize("name", SMALL)
def test_checkpointed_steps_are_followed_to_the_byte_too(name, policy, seeded):
    config = preset_config(name)
    network = build_backbone(config)
    apply_activation_checkpointing(network, policy)
    planned = step_memory(
        config, BATCH, precision="bf16", policy=policy, hardware="cpu", apply_policy=apply_activation_checkpointing
    )
    assert planned == followed(nullcontext(network), "bf16")
    assert planned.kept < step_memory(config, BATCH, precision="bf16", hardware="cpu").kept


def test_a_gpu_runs_every_twin_but_those_made_for_a_cpu():
    found = set()
    for op in OPS.values():
        args = [a.detach().to("meta") for a in op.example(tokens=4, dtype=torch.float32)]
        found |= {name for name in op.fast if "it is for CPUs" in op.refuses(name, tuple(args))}
    assert found == CPU_TWINS


def test_a_plan_for_a_gpu_keeps_no_scores_of_attention():
    def growth(hardware):
        few, many = (
            step_memory(preset_config("dit-s-2", depth=1, sample_size=side), 4, precision="bf16", hardware=hardware)
            for side in (16, 32)
        )
        return (many.kept - many.copies) / (few.kept - few.copies)

    assert growth("cuda") < 4.01  # four times as many tokens
    assert growth("cpu") > 4.2


@pytest.mark.parametrize("name", SMALL)
def test_memory_is_affine_in_the_images_of_a_micro_batch(name):
    config = preset_config(name, depth=(1, 0, 1, 0, 1) if name.startswith("udit") else 3)
    at = {n: step_memory(config, n, precision="bf16") for n in (8, 16, 24)}
    for field in ("kept", "peak"):
        low, middle, high = (getattr(m, field) for m in at.values())
        assert high - middle == middle - low > 0


def test_gradients_that_add_up_are_there_from_the_start():
    config = preset_config("dit-emoji32")
    first, later = (step_memory(config, 4, accumulating=more) for more in (False, True))
    trained = 4 * sum(p.numel() for p in build_backbone(config).parameters() if p.requires_grad)
    assert later.peak_with_gradients == pytest.approx(later.peak + trained, rel=1e-6)
    assert first.peak_with_gradients < later.peak_with_gradients


def test_a_followed_network_is_left_as_it_was():
    config = preset_config("dit-emoji32", depth=2)
    with fake_step(config, "full", "cuda", apply_activation_checkpointing) as network:
        assert all("forward" in block.__dict__ for block in network.iter_blocks())
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_a_policy_that_nobody_applies_is_refused():
    with pytest.raises(ValueError, match="apply_policy"):
        step_memory(preset_config("dit-emoji32"), 2, policy="full")
