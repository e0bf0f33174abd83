"""One pass instead of two calls: the same state of optimizer and average, for every backbone; two where it must."""

import copy
import json
import weakref
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import scramble
from torch import nn

from smalti.checkpoints.official import from_official
from smalti.diffusion import ObjectiveConfig, build_schedule, training_losses
from smalti.diffusion.levels import level_batch
from smalti.ops.adamw_ema import c
from smalti.presets import create_model
from smalti.training import EMA
from smalti.training.config import OptimizerConfig
from smalti.training.fused_update import Updates, refuses, update
from smalti.training.optim import build_optimizer, learning_rate

TINY = {
    "dit-emoji32": {"depth": 2, "hidden_size": 16, "num_heads": 2},
    "drwkv-emoji32": {"depth": 3, "hidden_size": 16},
    "diffussm-emoji32": {"depth": 2, "hidden_size": 16},
    "udit-emoji32": {"hidden_size": 8, "depth": (1, 1, 1, 1, 1)},
}
EPS = torch.finfo(torch.float32).eps
STEPS = 20
LATE = 10**9  # an update by which the average's warm-up is long over
PARITY = Path(__file__).parents[1] / "data" / "parity"
SAME_ORDER = torch.__version__.startswith("2.13.") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(bool(c.unavailable()), reason=c.unavailable()),
]


def plain(optimizer, ema, model, number):
    optimizer.step()
    ema.update(model, number)


class State(NamedTuple):
    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer


def state_of(model, config=None):
    model = copy.deepcopy(model)
    return State(model, EMA(model, 0.9), build_optimizer(model, config or OptimizerConfig(weight_decay=0.1)))


def train(state, call, *, steps=STEPS, size=8):
    """As the loop does, on made-up images; the reasons why a step took two calls, by step."""
    config = OptimizerConfig(weight_decay=0.1, warmup_steps=5)
    generator = torch.Generator().manual_seed(1)
    reasons = []
    for step in range(steps):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        x = torch.randn(2, 3, size, size, generator=generator)
        output = state.model(x, torch.tensor([1.0, 500.0]), torch.tensor([0, 3]))
        (output - torch.randn(output.shape, generator=generator)).square().mean().backward()
        reasons.append(refuses(state.optimizer, state.ema, state.model))
        call(state.optimizer, state.ema, state.model, step)
        state.optimizer.zero_grad()
    return reasons


def flat(state):
    names = {p: name for name, p in state.model.named_parameters()}
    moments = {names[p]: values for p, values in state.optimizer.state.items()}
    found = {f"{name}.{key}": x for name, values in moments.items() for key, x in values.items()}
    for prefix, module in (("model", state.model), ("ema", state.ema.model)):
        found |= {f"{prefix}.{name}": x for name, x in module.state_dict().items()}
    return found


def assert_same(one, two):
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    for name, x in one.items():
        if SAME_ORDER:
            assert torch.equal(x, two[name]), name
        else:
            # A last place of a weight in every step, and what the gradients of later steps make of it.
            torch.testing.assert_close(x, two[name], rtol=1e-4, atol=64 * STEPS * EPS)


@pytest.mark.parametrize("preset", TINY)
def test_twenty_steps_leave_the_state_of_the_two_plain_calls(preset):
    model = create_model(preset, sample_size=8, **TINY[preset])
    scramble(model)
    fused, two = state_of(model), state_of(model)
    reasons = train(fused, update)
    assert reasons[0].startswith("a parameter has no moments yet")
    assert reasons[1:] == [""] * (STEPS - 1)
    train(two, plain)
    assert_same(fused, two)
    assert not torch.equal(flat(fused)["model.head.out.weight"], model.head.out.weight)


def test_four_training_steps_of_the_released_dit_in_one_pass():
    """As tests/sampling/test_dit_parity.py, whose optimizer and average are separate."""
    tensors = load_file(PARITY / "train_steps_dit.safetensors")
    entry = json.loads((PARITY / "index_diffusion.json").read_text())["files"]["train_steps_dit.safetensors"]
    recipe = entry["training"]

    def released(prefix):
        part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        return from_official("facebookresearch/DiT", part, **entry["hyperparams"])

    model = released("state.").train()
    ema = EMA(model, recipe["ema_decay"])
    options = {"lr": recipe["lr"], "betas": tuple(recipe["betas"]), "eps": recipe["eps"], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, **options)
    levels = build_schedule("linear").levels(1000)
    for step in range(recipe["steps"]):
        got = training_losses(
            model,
            tensors["input.x0"][step],
            tensors["input.y"][step],
            eps=tensors["input.noise"][step],
            levels=level_batch(levels, tensors["input.t"][step]),
            config=ObjectiveConfig(),
            learned_variance=True,
        )
        optimizer.zero_grad()
        got.loss.mean().backward()
        assert (refuses(optimizer, ema, model) == "") == (step > 0)
        update(optimizer, ema, model, LATE)
    assert recipe["steps"] == 4
    for wanted, state in (
        (released("final.").state_dict(), model.state_dict()),
        (released("final_ema.").state_dict(), ema.model.state_dict()),
    ):
        assert wanted.keys() == state.keys()
        differences = torch.cat([(state[k] - wanted[k]).abs().flatten() for k in wanted])
        # Adam's first update is the sign of the gradient, so a few entries with almost none may fall the other way.
        assert (differences > 0.05 * recipe["lr"]).double().mean() <= 1e-3


class Odd(nn.Module):
    """A frozen weight, an unused one, one without decay, an empty one, buffers of two kinds."""

    without_weight_decay = ("spared",)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.spared = nn.Parameter(torch.randn(7))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.count += 1
        self.mean += x.mean()
        return self.linear(x) * self.spared + self.empty.sum()


def odd_steps(state, call, steps=range(STEPS)):
    generator = torch.Generator().manual_seed(2)
    for step in steps:
        state.model(torch.randn(4, 5, generator=generator)).square().sum().backward()
        call(state.optimizer, state.ema, state.model, step)
        state.optimizer.zero_grad()


def test_frozen_unused_spared_and_empty_parameters_and_buffers_go_their_own_way():
    model = Odd()
    fused, two = state_of(model), state_of(model)
    assert len(fused.optimizer.param_groups) == 2
    for state, call in ((fused, update), (two, plain)):
        odd_steps(state, call)
        with torch.no_grad():
            state.model.frozen += 1
            state.model.unused += 1
        odd_steps(state, call)
    assert refuses(fused.optimizer, fused.ema, fused.model) == ""
    assert_same(fused, two)
    assert torch.equal(fused.ema.model.mean, fused.model.mean)
    assert fused.model.mean.any()
    assert fused.ema.model.count == fused.model.count == 2 * STEPS
    assert torch.equal(fused.ema.model.frozen, fused.model.frozen)
    assert not torch.equal(fused.ema.model.unused, fused.model.unused)
    assert torch.equal(fused.ema.model.unused, two.ema.model.unused)


def test_gradients_through_weights_that_were_changed_meanwhile_are_refused_by_autograd():
    state = state_of(Odd())
    odd_steps(state, update)
    loss = state.model(torch.ones(1, 5)).sum()
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.model.frozen.grad = None
    state.model.unused.grad = None
    assert refuses(state.optimizer, state.ema, state.model) == ""
    update(state.optimizer, state.ema, state.model, STEPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def made(**options):
    """A trained state whose optimizer has options that ours never has."""
    model = Odd()
    state = State(model, EMA(model, 0.9), torch.optim.AdamW(model.linear.parameters(), **{"fused": True} | options))
    odd_steps(state, plain)
    return state


def hooked():
    state = made()
    state.optimizer.register_step_post_hook(lambda *_: None)
    return state


def scheduled():
    state = made()
    torch.optim.lr_scheduler.ConstantLR(state.optimizer)
    return state


def scaled():
    state = made()
    state.optimizer.grad_scale = torch.tensor(2.0)
    state.optimizer.found_inf = torch.tensor(0.0)
    return state


def foreign():
    state = made()
    other = type("OtherAdamW", (torch.optim.AdamW,), {})
    return state._replace(optimizer=other(state.model.linear.parameters(), fused=True))


def of_another_network():
    state = made()
    return state._replace(model=copy.deepcopy(state.model))


def in_float64():
    model = Odd().double()
    state = State(model, EMA(model, 0.9), build_optimizer(model, OptimizerConfig()))
    for step in range(2):
        model(torch.ones(4, 5, dtype=torch.float64)).square().sum().backward()
        plain(state.optimizer, state.ema, model, step)
    return state


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: made(amsgrad=True), "amsgrad"),
        (lambda: made(maximize=True), "maximize"),
        (lambda: made(fused=False), "fused=False"),
        (lambda: made(lr=torch.tensor(1e-3)), "rates are tensors"),
        (hooked, "hooks"),
        (scheduled, "replaced the optimizer's step"),
        (scaled, "gradient scaler"),
        (foreign, "it knows AdamW, got OtherAdamW"),
        (of_another_network, "that the network does not train"),
        (in_float64, "float32"),
    ],
)
def test_what_one_pass_does_not_know_takes_the_two_calls_with_a_reason(make, words, monkeypatch):
    state = make()
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            if state.optimizer.state[parameter]:
                parameter.grad = torch.ones_like(parameter)
    assert words in refuses(state.optimizer, state.ema, state.model)
    called = []
    monkeypatch.setattr(state.optimizer, "step", lambda: called.append("step"))
    monkeypatch.setattr(state.ema, "update", lambda model, number: called.append((model, number)))
    update(state.optimizer, state.ema, state.model, 7)
    assert called == ["step", (state.model, 7)]


def test_without_a_compiler_training_goes_on(monkeypatch):
    monkeypatch.setattr(c, "unavailable", lambda: "there is no C compiler")
    model = Odd()
    one, two = state_of(model), state_of(model)
    odd_steps(one, update)
    odd_steps(two, plain)
    assert refuses(one.optimizer, one.ema, one.model) == ""  # no gradients, nothing to do
    assert_same(one, two)


def test_either_goes_on_from_the_state_of_the_other():
    """Nothing of a checkpoint changes: the names and the tensors are those of torch."""
    model = Odd()
    states = []
    for first, second in ((update, plain), (plain, update)):
        one = state_of(model)
        odd_steps(one, first)
        two = state_of(model)
        two.model.load_state_dict(one.model.state_dict())
        two.ema.model.load_state_dict(one.ema.model.state_dict())
        two.optimizer.load_state_dict(one.optimizer.state_dict())
        odd_steps(two, second, range(STEPS, 2 * STEPS))
        states.append(two)
    assert {name.rpartition(".")[2] for name in flat(states[0]) if name.startswith("linear.weight.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert_same(*states)


@pytest.fixture
def mesh(tmp_path):
    """A group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def distributed(model, mesh):
    """The same module whose parameters are cut by rows."""
    from torch.distributed.tensor import Shard, distribute_tensor

    model = copy.deepcopy(model)
    for module in model.modules():
        for name, x in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(x.detach(), mesh, [Shard(0)])
            setattr(module, name, nn.Parameter(part, requires_grad=x.requires_grad))
    return model


def linear_steps(state, call):
    """Gradients that do not need a forward pass of distributed tensors."""
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        for x in state.model.parameters():
            gradient = torch.randn(x.shape, generator=generator)
            if type(x) is not nn.Parameter:
                from torch.distributed.tensor import distribute_tensor

                gradient = distribute_tensor(gradient, x.device_mesh, x.placements)
            x.grad = gradient
        call(state.optimizer, state.ema, state.model, step)


def test_distributed_tensors_are_changed_where_they_lie(mesh):
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    plain_model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model = distributed(plain_model, mesh)
    one, two = state_of(model), state_of(plain_model)
    before = one.model[0].weight._version
    linear_steps(one, update)
    linear_steps(two, plain)
    assert refuses(one.optimizer, one.ema, one.model) == ""
    assert isinstance(one.model[0].weight, DTensor)
    assert one.model[0].weight._version >= before + STEPS - 1  # the first step is torch's
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in flat(one).items()}
    for name, x in flat(two).items():
        torch.testing.assert_close(whole[name], x, rtol=0, atol=0 if SAME_ORDER else 64 * STEPS * EPS)
    weight = one.model[0].weight
    weight.grad = distribute_tensor(weight.grad.full_tensor(), mesh, [Replicate()])
    assert "cut differently" in refuses(one.optimizer, one.ema, one.model)


def replace_a_weight(state):
    """As code that loads weights by assigning: the optimizer is told, the average follows the new one."""
    old = state.model.linear.weight
    new = nn.Parameter(old.detach() * 2)
    state.model.linear.weight = new
    for group in state.optimizer.param_groups:
        group["params"] = [new if x is old else x for x in group["params"]]
    state.optimizer.state[new] = state.optimizer.state.pop(old)


def replace_an_average(state):
    old = state.ema.model.linear.weight
    state.ema.model.linear.weight = nn.Parameter(old * 2, requires_grad=False)


def load_the_optimizer(state):
    stored = copy.deepcopy(state.optimizer.state_dict())
    for moments in stored["state"].values():
        moments["exp_avg"] *= 2
    state.optimizer.load_state_dict(stored)


def restore_the_optimizer(state):
    """As `TrainState.restore`: the same dictionary with other tensors."""
    moments = {x: {k: v * 2 for k, v in values.items()} for x, values in state.optimizer.state.items()}
    state.optimizer.state.clear()
    state.optimizer.state.update(moments)


def replace_a_moment(state):
    moments = state.optimizer.state[state.model.spared]
    moments["exp_avg"] = moments["exp_avg"] * 2


def move_the_network(state):
    """`.to` of a module gives the same parameters other memory."""
    for module in (state.model, state.ema.model):
        module._apply(lambda x: x.clone())


def move_a_moment(state):
    moment = state.optimizer.state[state.model.spared]["exp_avg"]
    moment.data = moment.data * 2


def freeze(state):
    state.model.linear.bias.requires_grad_(False)
    state.model.linear.bias.grad = None


def use_the_unused(state):
    state.model.register_forward_hook(lambda module, _, output: output + module.unused.sum())


def other_rates(state):
    for group in state.optimizer.param_groups:
        group |= {"lr": 0.03, "weight_decay": 0.2, "betas": (0.8, 0.99), "eps": 1e-6}


def another_group(state):
    spared = state.optimizer.param_groups.pop()
    state.optimizer.add_param_group(spared | {"lr": 0.07})


def replace_a_buffer(state):
    state.model.mean = torch.ones(2)


def replace_a_module(state):
    """Its weights have an average that nobody looks at any more."""
    state.ema.model.linear = copy.deepcopy(state.ema.model.linear)
    with torch.no_grad():
        state.ema.model.linear.weight.zero_()


def transpose_a_moment(state):
    """Same object, same address."""
    state.optimizer.state[state.model.linear.weight]["exp_avg"].t_()


CHANGES = [
    replace_a_weight, replace_an_average, load_the_optimizer, restore_the_optimizer, replace_a_moment, move_the_network,
    move_a_moment, freeze, use_the_unused, other_rates, another_group, replace_a_buffer, replace_a_module,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_two_updates_the_next_ones_are_about_what_is_there_then(change):
    model = Odd()
    fused, two = state_of(model), state_of(model)
    updates = Updates()
    for state, call in ((fused, updates), (two, plain)):
        odd_steps(state, call, range(5))
        change(state)
        odd_steps(state, call, range(5, 15))
    assert_same(fused, two)


def test_what_is_remembered_is_used_and_gradients_in_new_memory_are_found():
    model = Odd()
    fused, two = state_of(model), state_of(model)
    updates, plans, kept = Updates(), [], []

    def call(*arguments):
        kept.append([x.grad for x in fused.model.parameters() if x.grad is not None])  # so memory is never used again
        updates(*arguments)
        plans.append(updates._plan)

    odd_steps(fused, call)
    odd_steps(two, plain)
    assert plans[0] is None
    assert plans[1] is not None
    assert all(plan is plans[1] for plan in plans[1:])
    assert len({x.data_ptr() for row in kept for x in row if x.numel()}) == STEPS * 3
    assert_same(fused, two)


def test_a_moment_turned_around_in_place_is_refused_and_one_of_another_run_is_not_confused():
    state, other = state_of(Odd()), state_of(Odd())
    updates = Updates()
    odd_steps(state, updates)
    odd_steps(other, updates)
    with torch.no_grad():
        transpose_a_moment(state)
    state.model(torch.ones(4, 5)).sum().backward()
    assert "contiguous" in refuses(state.optimizer, state.ema, state.model)
    assert not updates._plan.holds(state.optimizer, state.ema, state.model)


def test_gradients_are_let_go_of_after_the_update():
    state = state_of(Odd())
    updates = Updates()
    odd_steps(state, updates)
    state.model(torch.ones(4, 5)).sum().backward()
    gradient = weakref.ref(state.model.linear.weight.grad)
    updates(state.optimizer, state.ema, state.model, STEPS)
    state.optimizer.zero_grad()
    assert gradient() is None
