"""A few steps of training on CUDA: they learn, they repeat, and an interrupted run ends with the same bits."""

import copy

import numpy as np
import pytest
import torch

from smalti.checkpoints import CheckpointStore
from smalti.data import SampleOrder
from smalti.data.examples import PixelExamples
from smalti.data.image_set import ArrayImages
from smalti.diffusion import ObjectiveConfig, build_schedule
from smalti.training import EMA, OptimizerConfig, RunConfig, TrainState, train_steps
from smalti.training.batches import BatchSource
from smalti.training.config import ParallelConfig
from smalti.training.device import autocast_dtype
from smalti.training.distributed import Parallel, whole
from smalti.training.optim import build_optimizer
from smalti.world import World

IMAGES = 24


@pytest.fixture
def batches():
    """Flat colours with a stripe, one colour per class."""
    labels = np.arange(IMAGES, dtype=np.int64) % 5
    images = np.zeros((IMAGES, 16, 16, 3), dtype=np.uint8)
    images[:] = (labels * 50)[:, None, None, None]
    images[np.arange(IMAGES), labels * 3] = 255
    names = tuple(map(str, range(IMAGES)))
    image_set = ArrayImages("stripes", tuple("abcde"), labels, names, names, "stripes", images)
    return BatchSource(
        PixelExamples(image_set),
        SampleOrder(range(IMAGES), seed=0),
        build_schedule("linear"),
        ObjectiveConfig(),
        null_class=5,
        flip=False,
        seed=0,
    )


def run_config(precision, steps, **changes):
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=2, clip_norm=1.0)
    return RunConfig(steps=steps, batch_size=8, precision=precision, optimizer=optimizer, **changes)


def new_state(make_dit, device, config):
    model = make_dit().to(device).train()
    return TrainState(model, EMA(model, 0.9), build_optimizer(model, config.optimizer))


def all_tensors(state):
    return {f"{group}.{name}": t.cpu() for group, tensors in state.groups().items() for name, t in tensors.items()}


def differing(state, other):
    ours, theirs = all_tensors(state), all_tensors(other)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer.") for name in ours)
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss_and_keeps_float32_weights(make_dit, device, batches, precision):
    config = run_config(precision, 60)
    state = new_state(make_dit, device, config)
    before = copy.deepcopy(state.model)
    reports = list(train_steps(state, batches, config))
    losses = [report.loss for report in reports]
    assert [report.step for report in reports] == list(range(1, 61))
    assert not any(report.skipped for report in reports)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert {p.device.type for p in state.ema.model.parameters()} == {device.type}
    trained = [
        not torch.equal(a, b)
        for a, b in zip(before.parameters(), state.model.parameters(), strict=True)
        if b.requires_grad
    ]
    assert all(trained)


def test_the_first_losses_are_those_of_a_cpu(make_dit, device, batches):
    config = run_config("fp32", 3)
    losses, norms = {}, {}
    for where in ("cpu", device):
        reports = list(train_steps(new_state(make_dit, where, config), batches, config))
        losses[where], norms[where] = ([getattr(r, what) for r in reports] for what in ("loss", "grad_norm"))
    # The first step differs by rounding only. Adam divides by small gradients, so later ones drift further apart.
    assert losses[device][0] == pytest.approx(losses["cpu"][0], rel=1e-5)
    assert norms[device][0] == pytest.approx(norms["cpu"][0], rel=1e-4)
    assert losses[device] == pytest.approx(losses["cpu"], rel=1e-2)


def test_micro_batches_give_the_gradients_of_the_whole_batch(make_dit, device, batches):
    norms = []
    for micro_batch in (None, 3):
        config = run_config("fp32", 1, micro_batch=micro_batch)
        norms += [report.grad_norm for report in train_steps(new_state(make_dit, device, config), batches, config)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_end_with_the_same_bits(make_dit, device, batches, deterministic, precision):
    config = run_config(precision, 5)
    states = [new_state(make_dit, device, config) for _ in range(2)]
    for state in states:
        list(train_steps(state, batches, config))
    assert differing(*states) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    make_dit, device, batches, deterministic, precision, tmp_path
):
    config = run_config(precision, 8)
    whole = new_state(make_dit, device, config)
    list(train_steps(whole, batches, config))

    store = CheckpointStore(tmp_path)
    first = new_state(make_dit, device, config)
    for report in train_steps(first, batches, config):
        if report.step == 3:
            store.save(first.step, first.groups(), first.counters())
            break
    skipped: list[str] = []
    stored = store.load_newest(skipped.append)
    assert stored is not None
    assert (stored.step, skipped) == (3, [])
    second = new_state(make_dit, device, config)
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(1.0)  # so that only what was stored can bring the weights back
    second.restore(stored)
    list(train_steps(second, batches, config))
    assert differing(second, whole) == []


@pytest.fixture
def nccl(tmp_path):
    """This process and its GPU as a world of one."""
    if not torch.distributed.is_nccl_available():
        pytest.skip("this PyTorch was built without NCCL")
    where = f"file://{tmp_path / 'store'}"
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=where, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ddp_and_fsdp_over_nccl_take_the_steps_of_the_network_alone(
    make_dit, device, batches, nccl, deterministic, strategy, precision
):
    """A world of one exchanges nothing with others; what wraps the network is the same as in a world of many."""
    from torch.distributed.device_mesh import init_device_mesh

    config = run_config(precision, 3, micro_batch=4)
    alone = new_state(make_dit, device, config)
    expected = list(train_steps(alone, batches, config))
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("shard",)) if strategy == "fsdp" else None
    parallel = ParallelConfig(strategy=strategy, activation_checkpointing="selective")
    shared = Parallel(parallel, World(), strategy, torch.device("cuda", 0), autocast_dtype(precision), mesh)
    model = make_dit().to(device).train()
    ema = EMA(model, 0.9)
    shared.evaluated(ema.model)
    engine = shared.trained(model)
    state = TrainState(model, ema, build_optimizer(model, config.optimizer), engine=engine)
    found = list(train_steps(state, batches, config))
    limit = 1e-5 if precision == "fp32" else 2.0**-9
    assert [r.grad_norm for r in found] == pytest.approx([r.grad_norm for r in expected], rel=limit)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=limit)
    assert model.state_dict().keys() == alone.model.state_dict().keys()
    assert all(whole(tensor).isfinite().all() for tensor in ema.model.state_dict().values())
